"""Starts and supervises an SGLang server with the plugin and the arguments that Updraft needs."""
