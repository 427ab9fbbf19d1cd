"""The cluster as the operator sees it: watches, cached objects, work queue, Secrets, leader election."""
