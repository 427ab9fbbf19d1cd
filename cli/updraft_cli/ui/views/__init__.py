"""View models: what a page shows, as plain values made from a snapshot. Pure; templates only lay them out."""
