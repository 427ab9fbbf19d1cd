"""The agent's work for any server with the plugin: prepare its folders, and read its messages."""
