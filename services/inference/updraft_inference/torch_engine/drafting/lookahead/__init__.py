"""The choice of proposer and number of draft tokens per sequence and step, from measured costs and acceptance."""
