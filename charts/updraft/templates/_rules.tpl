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
  resources: [adaptivespeculators/finalizers]
  verbs: [update]
# One object for each version that the registry keeps.
- apiGroups: [updraft.dev]
  resources: [draftversions]
  verbs: [get, list, watch, create, patch, delete]
# Phase, pods and acceptance of a version.
- apiGroups: [updraft.dev]
  resources: [draftversions/status]
  verbs: [patch]
# Inference and trainer (Deployments), registry (StatefulSet).
- apiGroups: [apps]
  resources: [deployments, statefulsets]
  verbs: [get, list, watch, create, patch, delete]
# Nodes are drained one inference pod at a time.
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
# Who may call which part.
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
# Where parts are found, what they are told, who they are, and the trainer's volume.
- apiGroups: [""]
  resources: [services, configmaps, serviceaccounts, persistentvolumeclaims]
  verbs: [get, list, watch, create, patch, delete]
# Imports of drafts that are somewhere else.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
# Why pods are not ready: the reasons in conditions.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
# Tokens of the registry's roles, by name. It can neither list nor watch Secrets.
- apiGroups: [""]
  resources: [secrets]
  verbs: [get, create, patch]
# What happened, beside the resource (`kubectl describe`).
- apiGroups: ["", events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end -}}

{{/* What the hook before an uninstall may do there. */}}
{{- define "updraft.release.rules" -}}
# To find resources with our finalizer, and take it off.
- apiGroups: [updraft.dev]
  resources: [adaptivespeculators]
  verbs: [get, list, patch]
{{- end -}}
