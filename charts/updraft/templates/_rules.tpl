{{/* Permissions of the operator in every namespace that it watches. tests/chart/test_rbac.py checks the list. */}}
{{- define "updraft.rules" -}}
# The resources that it reconciles. It never writes a spec: patch is for the finalizer of `deletionPolicy: Delete`.
- apiGroups: [updraft.dev]
  resources: [adaptivespeculators]
  verbs: [get, list, watch, patch]
# Their status.
- apiGroups: [updraft.dev]
  resources: [adaptivespeculators/status]
  verbs: [patch]
# OwnerReferencesPermissionEnforcement (OpenShift) requires this permission to set owner references.
- apiGroups: [updraft.dev]
  resources: [adaptivespeculators/finalizers, draftimports/finalizers]
  verbs: [update]
# One object per version that the registry keeps.
- apiGroups: [updraft.dev]
  resources: [draftversions]
  verbs: [get, list, watch, create, patch, delete]
# Drafts to import: those of users, and one for `spec.draft.initial`. The operator deletes none.
- apiGroups: [updraft.dev]
  resources: [draftimports]
  verbs: [get, list, watch, create, patch]
# Phase, pods and acceptance of a version; the result of an import.
- apiGroups: [updraft.dev]
  resources: [draftversions/status, draftimports/status]
  verbs: [patch]
# Inference and trainer. The trainer is deleted if tracing is disabled.
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
# The registry, and a trainer of several ranks, which is deleted when it gets one rank again.
- apiGroups: [apps]
  resources: [statefulsets]
  verbs: [get, list, watch, create, patch, delete]
{{- if or (not .Values.watchNamespaces) (.Capabilities.APIVersions.Has "leaderworkerset.x-k8s.io/v1") }}
# A trainer of several pods. With watchNamespaces, only if the cluster serves this API: a namespace administrator cannot grant
# permissions for an absent one.
- apiGroups: [leaderworkerset.x-k8s.io]
  resources: [leaderworkersets]
  verbs: [get, list, watch, create, patch, delete]
{{- end }}
# At most one inference pod is evicted at a time.
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch]
# Which peers may call which part.
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
# Settings of the parts. The trainer's is deleted with the trainer.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch, delete]
# How clients and ranks find pods. The one of ranks is deleted with their StatefulSet.
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch, delete]
# Identities and the trainer's volumes. The operator deletes none of them: they are deleted with their owner.
- apiGroups: [""]
  resources: [serviceaccounts, persistentvolumeclaims]
  verbs: [get, list, watch, create, patch]
# Imports of drafts. A Job is deleted when its import changes, or to repeat one whose result is lost.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
# Why pods are not ready, for the reasons of conditions. Trainer pods of an older template are deleted, all at once.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, delete]
{{- if include "updraft.rules.byName" . }}
{{- include "updraft.rules.secrets" . | nindent 0 }}
{{- else }}
# Whether the Secrets that specs name exist, by name. The operator can neither list nor watch Secrets.
- apiGroups: [""]
  resources: [secrets]
  verbs: [get]
{{- if include "updraft.rules.writes" . }}
# One Secret per role, with the address and the role's own user, for the pods of resources that name no Redis; and one per
# registry, with its certificate.
- apiGroups: [""]
  resources: [secrets]
  verbs: [create, patch]
{{- end }}
{{- end }}
{{- if eq .Values.tls.mode "CertManager" }}
# One per server of a resource: cert-manager signs it. That of a dedicated Redis is deleted with it.
- apiGroups: [cert-manager.io]
  resources: [certificates]
  verbs: [get, list, watch, create, patch, delete]
{{- end }}
# Events of resources (`kubectl describe`).
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end -}}

{{/* Not empty if the operator's permissions on Secrets are restricted to names. */}}
{{- define "updraft.rules.byName" -}}
{{- $secrets := .Values.rbac.secrets | default dict }}
{{- if and (not $secrets.byName) (or $secrets.ofSpeculators $secrets.named) }}
{{- fail "rbac.secrets lists names, which restrict nothing: set rbac.secrets.byName" }}
{{- end }}
{{- if $secrets.byName }}yes{{ end -}}
{{- end -}}

{{/* Not empty if the operator makes Secrets in the namespaces that it watches. */}}
{{- define "updraft.rules.writes" -}}
{{- if or .Values.redis.dedicated (ne (include "updraft.redis.kind" .) "none") (eq .Values.tls.mode "SelfSigned") }}yes{{ end -}}
{{- end -}}

{{/* Secrets by name: those that the operator makes for the resources of `rbac.secrets.ofSpeculators`, and those of
`rbac.secrets.named`. tests/chart/test_rbac.py compares the endings with the operator's code. */}}
{{- define "updraft.rules.secrets" -}}
{{- $own := list }}
{{- range $name := .Values.rbac.secrets.ofSpeculators }}
{{- range list "redis-writer" "redis-reader" "dedicated-writer" "dedicated-reader" "registry-tls" "redis-tls" "metrics-tls" }}
{{- $own = append $own (printf "%s-%s" $name .) }}
{{- end }}
{{- end }}
{{- $known := concat $own .Values.rbac.secrets.named | uniq }}
{{- /* A rule with no names would allow all. */}}
{{- if $known }}
# The Secrets of these resources, and whether those exist that their specs name.
- apiGroups: [""]
  resources: [secrets]
  resourceNames: {{ $known | toJson }}
  verbs: [get]
{{- end }}
{{- if and $own (include "updraft.rules.writes" .) }}
# The Secrets of these resources: addresses of Redis, and certificates. What is applied and not there yet is created with its
# name in the request, so that it can be restricted, too.
- apiGroups: [""]
  resources: [secrets]
  resourceNames: {{ $own | toJson }}
  verbs: [create, patch]
{{- end }}
{{- end -}}

{{/* Permissions of the pre-uninstall hook in those namespaces. */}}
{{- define "updraft.release.rules" -}}
# To find resources with the operator's finalizer and remove it.
- apiGroups: [updraft.dev]
  resources: [adaptivespeculators]
  verbs: [get, list, patch]
{{- end -}}
