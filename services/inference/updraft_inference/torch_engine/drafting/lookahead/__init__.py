"""The choice of proposer and number of drafts per sequence and step, from measured costs and acceptance."""
