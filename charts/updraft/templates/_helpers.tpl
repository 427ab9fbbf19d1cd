{{/* Prefix of all names. 40 characters leave room for the longest suffix. */}}
{{- define "updraft.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "updraft.operator" -}}
{{- printf "%s-operator" (include "updraft.fullname" .) -}}
{{- end -}}

{{- define "updraft.redis" -}}
{{- printf "%s-redis" (include "updraft.fullname" .) -}}
{{- end -}}

{{/* Secret with the operator's CA. */}}
{{- define "updraft.ca" -}}
{{- printf "%s-ca" (include "updraft.fullname" .) -}}
{{- end -}}

{{/* Secret with the certificate of the bundled Redis. cert-manager makes its own, of a type that cannot be changed. */}}
{{- define "updraft.redis.certificate" -}}
{{- printf "%s-%s" (include "updraft.redis" .) (ternary "cert-manager" "tls" (eq .Values.tls.mode "CertManager")) -}}
{{- end -}}

{{- define "updraft.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "updraft.operator" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name: name your ServiceAccount, or let the chart create one (serviceAccount.create)" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change. Registries admit pods named updraft-operator (operator/updraft_operator/manifests/network.py). */}}
{{- define "updraft.selector" -}}
app.kubernetes.io/name: updraft-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "updraft.redis.selector" -}}
app.kubernetes.io/name: updraft-redis
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Metadata of an object: (list $ NAME) or (list $ NAME (dict "name" ..., "namespace" ..., "labels" ..., "annotations" ...)). */}}
{{- define "updraft.metadata" -}}
{{- $ := index . 0 -}}
{{- $more := dict -}}
{{- if gt (len .) 2 }}{{ $more = index . 2 }}{{ end -}}
{{- $labels := dict
    "app.kubernetes.io/name" (default "updraft-operator" $more.name)
    "app.kubernetes.io/instance" $.Release.Name
    "app.kubernetes.io/version" $.Chart.AppVersion
    "app.kubernetes.io/part-of" "updraft"
    "app.kubernetes.io/managed-by" $.Release.Service
    "helm.sh/chart" (printf "%s-%s" $.Chart.Name $.Chart.Version | replace "+" "_") -}}
{{- $annotations := mergeOverwrite (dict) $.Values.commonAnnotations (default dict $more.annotations) -}}
name: {{ index . 1 }}
{{- with $more.namespace }}
namespace: {{ . }}
{{- end }}
labels:
  {{- mergeOverwrite (dict) $.Values.commonLabels (default dict $more.labels) $labels | toYaml | nindent 2 }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Address of an image: (list $ IMAGE TAG), where TAG is the default tag. */}}
{{- define "updraft.image" -}}
{{- $ := index . 0 -}}
{{- $image := index . 1 -}}
{{- $registry := default $.Values.image.registry $image.registry -}}
{{- with $registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- $image.repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ default (index . 2) $image.tag }}{{ end -}}
{{- end -}}

{{/* Address of one of Updraft's images: (list $ PART). */}}
{{- define "updraft.ownImage" -}}
{{- $ := index . 0 -}}
{{- include "updraft.image" (list $ (index $.Values.images (index . 1)) (default $.Chart.AppVersion $.Values.image.tag)) -}}
{{- end -}}

{{- define "updraft.pullSecrets" -}}
{{- with .Values.imagePullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Whether OpenShift chooses the user of pods: `true` or nothing. */}}
{{- define "updraft.openshift" -}}
{{- if or (kindIs "invalid" .Values.openshift) (eq (toString .Values.openshift) "auto") -}}
{{- if .Capabilities.APIVersions.Has "security.openshift.io/v1" }}true{{ end -}}
{{- else if .Values.openshift -}}
true
{{- end -}}
{{- end -}}

{{/* The restricted Pod Security standard for pods and containers; the arguments are the context and the user. */}}
{{- define "updraft.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  {{- if not (include "updraft.openshift" (index . 0)) }}
  runAsUser: {{ index . 1 }}
  runAsGroup: {{ index . 1 }}
  fsGroup: {{ index . 1 }}
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{- define "updraft.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{/* Environment variables of every process of the operator's image. */}}
{{- define "updraft.scope" -}}
- name: UPDRAFT_OPERATOR_NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
- name: UPDRAFT_OPERATOR_WATCH_NAMESPACES
  value: {{ join "," .Values.watchNamespaces | quote }}
- name: UPDRAFT_OPERATOR_LOG_LEVEL
  value: {{ .Values.logLevel | quote }}
- name: UPDRAFT_OPERATOR_LOG_FORMAT
  value: {{ .Values.logFormat | quote }}
{{- end -}}

{{/* "true" if a part of the monitoring is enabled: (list $ ENABLED). */}}
{{- define "updraft.monitored" -}}
{{- $ := index . 0 -}}
{{- $enabled := index . 1 -}}
{{- if or (kindIs "invalid" $enabled) (eq (toString $enabled) "auto") -}}
{{- if $.Capabilities.APIVersions.Has "monitoring.coreos.com/v1" }}true{{ end -}}
{{- else if $enabled -}}
true
{{- end -}}
{{- end -}}

{{/* The source of the Redis: bundled, url, secret or none. */}}
{{- define "updraft.redis.kind" -}}
{{- $redis := .Values.redis -}}
{{- if and $redis.enabled (or $redis.url $redis.existingSecret.name) -}}
{{- fail "redis: set enabled: false to use the Redis of redis.url or redis.existingSecret" -}}
{{- end -}}
{{- if and $redis.url $redis.existingSecret.name -}}
{{- fail "redis: set one of url and existingSecret, not both" -}}
{{- end -}}
{{- if $redis.enabled }}bundled{{ else if $redis.url }}url{{ else if $redis.existingSecret.name }}secret{{ else }}none{{ end -}}
{{- end -}}

{{/* The password of the bundled Redis: generated once, then read from the cluster. */}}
{{- define "updraft.redis.password" -}}
{{- $old := lookup "v1" "Secret" .Release.Namespace (include "updraft.redis" .) -}}
{{- $data := default dict (get (default dict $old) "data") -}}
{{- if hasKey $data "password" }}{{ get $data "password" | b64dec }}{{ else }}{{ randAlphaNum 32 }}{{ end -}}
{{- end -}}

{{/* The Secret with the key of dedicated Redis, which the operator fills. */}}
{{- define "updraft.redis.keySecret" -}}
{{ include "updraft.operator" . }}-redis-key
{{- end -}}

{{/* name and key of the Secret with that password. */}}
{{- define "updraft.redis.passwordKey" -}}
{{- $own := .Values.redis.auth.existingSecret -}}
name: {{ default (include "updraft.redis" .) $own.name }}
key: {{ ternary $own.key "password" (not (empty $own.name)) }}
{{- end -}}

{{/* Prefix of cluster-scoped objects, so that two releases of the same name do not collide. */}}
{{- define "updraft.clusterName" -}}
{{- if eq .Release.Namespace (include "updraft.fullname" .) -}}
{{- include "updraft.fullname" . -}}
{{- else -}}
{{- printf "%s-%s" .Release.Namespace (include "updraft.fullname" .) -}}
{{- end -}}
{{- end -}}

{{/* The scheme of a probe of the operator's port; empty for http, which is the default. */}}
{{- define "updraft.metricsScheme" -}}
{{- if and .Values.tls.metrics (ne .Values.tls.mode "Disabled") -}}
scheme: HTTPS
{{- end }}
{{- end }}
