"""The router: takes clients' calls, places requests on workers, recovers them, tracks sessions and metrics. No torch, no Ray."""
