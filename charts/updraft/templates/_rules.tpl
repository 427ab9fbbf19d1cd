{{/* What the operator may do, in every namespace that it works in. tests/chart/test_rbac.py holds the list. */}}
{{- define "updraft.rules" -}}
# Resources that it works on. It never writes a spec: patch is for the finalizer of `deletionPolicy: Delete`.
- apiGroups: [updraft.dev]
  resources: [adaptivespeculators]
  verbs: [get, list, watch, patch]
# What it found out.
- apiGroups: [updraft.dev]
  resources: [adaptivespeculators/status]
  verbs: [patch]
# Where OwnerReferencesPermissionEnforcement is on (OpenShift), an owner is named by who may do this only.
- apiGroups: [updraft.dev]
  resources: [adaptivespeculators/finalizers, draftversions/finalizers]
  verbs: [update]
# One object for each version that the registry keeps.
- apiGroups: [updraft.dev]
  resources: [draftversions]
  verbs: [get, list, watch, create, patch, delete]
# Phase, pods and acceptance of a version.
- apiGroups: [updraft.dev]
  resources: [draftversions/status]
  verbs: [patch]
# Inference and trainer; there is no trainer once nothing is captured.
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
# The registry.
- apiGroups: [apps]
  resources: [statefulsets]
  verbs: [get, list, watch, create, patch]
# Nodes are drained one inference pod at a time.
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch]
# Who may call which part.
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
# What parts are told; the trainer's goes with it.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch, delete]
# Where parts are found, who they are, and the trainer's volume. It deletes none: they go with their resource.
- apiGroups: [""]
  resources: [services, serviceaccounts, persistentvolumeclaims]
  verbs: [get, list, watch, create, patch]
# Imports of drafts that are somewhere else.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch]
# Why pods are not ready: the reasons in conditions.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
# Tokens of the registry's roles, by name. It can neither list nor watch Secrets.
- apiGroups: [""]
  resources: [secrets]
  verbs: [get, create, patch]
# What happened, beside the resource (`kubectl describe`).
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end -}}

{{/* What the hook before an uninstall may do there. */}}
{{- define "updraft.release.rules" -}}
# To find resources with our finalizer, and take it off.
- apiGroups: [updraft.dev]
  resources: [adaptivespeculators]
  verbs: [get, list, patch]
{{- end -}}
