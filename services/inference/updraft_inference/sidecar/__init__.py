"""The agent beside a server of somebody else's, whose plugin tells it what the server does. No request goes through it."""
