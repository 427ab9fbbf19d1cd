"""Which version each pod serves: pure functions of policy, fleet and time."""
