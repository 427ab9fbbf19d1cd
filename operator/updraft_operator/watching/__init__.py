"""The operator's view of the cluster: watches, cached objects, work queue, Secrets, leader election."""
