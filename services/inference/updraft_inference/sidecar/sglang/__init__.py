"""Drafts of several SGLang ranks: SGLang's own weight update swaps them at one step, and its checksums prove the swap."""
