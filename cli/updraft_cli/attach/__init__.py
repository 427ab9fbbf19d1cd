"""Servers that someone else starts: what they need to work with Updraft, and what a running one lacks."""
