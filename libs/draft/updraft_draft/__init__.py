"""The torch code that trainer and inference must agree on byte for byte."""
