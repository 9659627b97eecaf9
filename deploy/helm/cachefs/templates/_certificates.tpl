{{/* The certificates that are wanted, as a list of dicts: what (label), secret, names (DNS), usages. */}}
{{- define "cachefs.certificates" -}}
{{- $etcd := printf "%s-etcd.%s" (include "cachefs.name" .) .Release.Namespace }}
{{- if include "cachefs.peerTls" . }}
- {what: peer, secret: {{ include "cachefs.peerTls" . }}, names: [{{ include "cachefs.name" . }}-peer]}
{{- end }}
{{- if include "cachefs.etcdServerTls" . }}
- {what: etcd-server, secret: {{ include "cachefs.etcdServerTls" . }}, names: [localhost, {{ $etcd }}.svc, "*.{{ $etcd }}.svc", "*.{{ $etcd }}.svc.cluster.local"]}
- {what: etcd-client, secret: {{ include "cachefs.etcdClientTls" . }}, names: [{{ include "cachefs.name" . }}-etcd-client]}
{{- end }}
{{- end }}
