"""Terms, policy and statistics of rollouts, shared by every part that deals with them."""
