"""How trainer processes know of each other, beside what they compute together."""
