"""The load generator behind `baton bench`: it needs neither torch nor Ray.

    arrivals, lengths, traces, prompts     what is sent, and when: pure, drawn from a seed before the run
    runner                                 sends it, open-loop or closed-loop, and keeps a record of each request
    grpc_target, openai_target             the servers that it can be sent to
    records, figures                       what happened, and what follows from it: pure
    report, plots                          files

Everything of a run belongs to one event loop. Nothing is drawn, tokenized or serialized while requests are timed, where it can be
known before.
"""
