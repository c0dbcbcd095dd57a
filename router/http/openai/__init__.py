"""OpenAI's HTTP API for text: completions, chat completions and models, over `router.inference`."""
