"""From prompts to contexts: Gemma, connectors, and the cache of encoded prompts."""
