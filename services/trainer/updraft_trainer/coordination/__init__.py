"""The processes that train together ("ranks"): how they meet, add up, and tell each other what they do."""
