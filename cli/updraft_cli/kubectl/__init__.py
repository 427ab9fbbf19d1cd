"""`kubectl updraft`: drafts as the API server knows them.

It reads AdaptiveSpeculators, DraftVersions and their Events, and patches three fields of a rollout. It never calls a
registry or a pod, so the cluster's RBAC, admission and audit hold for everything that it does. It knows none of the
operator's code: the API server is what they have in common.
"""
