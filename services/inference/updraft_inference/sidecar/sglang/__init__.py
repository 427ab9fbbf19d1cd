"""What differs for SGLang: its own weight update swaps the draft on all ranks at one step, and its checksums prove it."""
