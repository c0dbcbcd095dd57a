"""Baton's Grafana dashboards as code: `python -m monitoring` writes them to k8s/monitoring/dashboards, where they are committed.

promql    expressions over Baton's series
panels    what a dashboard is made of, and how it becomes Grafana's
fleet, latency, kv, sessions, faults    one dashboard each
"""
