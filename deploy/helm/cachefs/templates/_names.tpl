{{/* Names that follow from `instance`. The release name is in none of them: one instance is one set of directories. */}}

{{- define "cachefs.name" -}}
cachefs{{ with .Values.instance }}-{{ . }}{{ end }}
{{- end }}

{{- define "cachefs.driver" -}}
{{- if .Values.driverName }}{{ .Values.driverName }}{{ else }}{{ with .Values.instance }}{{ . }}.{{ end }}cachefs.csi.k8s.io{{ end }}
{{- end }}

{{- define "cachefs.runtimeDir" -}}
{{ .Values.runtimeDir | default (printf "/run/%s" (include "cachefs.name" .)) }}
{{- end }}

{{- define "cachefs.cacheDir" -}}
{{ .Values.cache.hostPath | default (printf "/var/cache/%s" (include "cachefs.name" .)) }}
{{- end }}

{{- define "cachefs.pluginDir" -}}
{{ .Values.kubeletDir }}/plugins/{{ include "cachefs.driver" . }}
{{- end }}

{{- define "cachefs.cluster" -}}
{{ .Values.etcd.cluster | default (include "cachefs.name" .) }}
{{- end }}

{{/* Labels by which pods are selected: never changed by an upgrade. Arguments: dict "top" $ "part" name */}}
{{- define "cachefs.selector" -}}
app.kubernetes.io/name: cachefs
app.kubernetes.io/instance: {{ include "cachefs.name" .top }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "cachefs.labels" -}}
{{ include "cachefs.selector" . }}
app.kubernetes.io/part-of: cachefs
app.kubernetes.io/version: {{ .top.Chart.AppVersion | quote }}
{{- end }}

{{/* An image with its registry. Arguments: dict "top" $ "image" (dict registry repository tag digest) */}}
{{- define "cachefs.image" -}}
{{- $registry := .top.Values.imageRegistry | default .image.registry -}}
{{- with $registry }}{{ . }}/{{ end }}{{ .image.repository }}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default .top.Chart.AppVersion }}{{ end }}
{{- end }}

{{/* Bytes of a size such as 2GiB, 512MiB or 0. */}}
{{- define "cachefs.bytes" -}}
{{- $number := regexFind "^[0-9]+" . | int64 -}}
{{- if hasSuffix "TiB" . }}{{ mul $number 1099511627776 }}
{{- else if hasSuffix "GiB" . }}{{ mul $number 1073741824 }}
{{- else if hasSuffix "MiB" . }}{{ mul $number 1048576 }}
{{- else }}{{ $number }}{{ end -}}
{{- end }}

{{/* What the agent keeps in memory, tiers included, in MiB. */}}
{{- define "cachefs.agentMebibytes" -}}
{{- $cache := .Values.cache -}}
{{ div (add (include "cachefs.bytes" $cache.shmSize | int64) (include "cachefs.bytes" $cache.memoryLimit | int64)) 1048576 }}
{{- end }}

{{/* Names of the Secrets with certificates; empty: that part has none. */}}
{{- define "cachefs.peerTls" -}}
{{- if and (ne .Values.etcd.mode "none") (eq .Values.peers.auth "tls") -}}
{{- if eq .Values.tls.mode "existing" }}{{ .Values.tls.existing.peer }}{{ else }}{{ include "cachefs.name" . }}-peer-tls{{ end -}}
{{- end -}}
{{- end }}

{{- define "cachefs.etcdServerTls" -}}
{{- if and (eq .Values.etcd.mode "bundled") (ne .Values.tls.mode "none") -}}
{{- if eq .Values.tls.mode "existing" }}{{ .Values.tls.existing.etcdServer }}{{ else }}{{ include "cachefs.name" . }}-etcd-server-tls{{ end -}}
{{- end -}}
{{- end }}

{{- define "cachefs.etcdClientTls" -}}
{{- if eq .Values.etcd.mode "external" }}{{ .Values.etcd.external.tlsSecret }}
{{- else if and (eq .Values.etcd.mode "bundled") (ne .Values.tls.mode "none") -}}
{{- if eq .Values.tls.mode "existing" }}{{ .Values.tls.existing.etcdClient }}{{ else }}{{ include "cachefs.name" . }}-etcd-client-tls{{ end -}}
{{- end -}}
{{- end }}

{{- define "cachefs.peerSecret" -}}
{{- if and (ne .Values.etcd.mode "none") (eq .Values.peers.auth "secret") -}}
{{ .Values.peers.existingSecret | default (printf "%s-peer" (include "cachefs.name" .)) }}
{{- end -}}
{{- end }}

{{/* Addresses of etcd, with commas between. */}}
{{- define "cachefs.etcdEndpoints" -}}
{{- if eq .Values.etcd.mode "external" -}}
{{ join "," .Values.etcd.external.endpoints }}
{{- else if eq .Values.etcd.mode "bundled" -}}
{{- $scheme := ternary "http" "https" (eq .Values.tls.mode "none") -}}
{{- $service := printf "%s-etcd" (include "cachefs.name" .) -}}
{{- $urls := list -}}
{{- range $index := until (int .Values.etcd.bundled.replicas) -}}
{{- $urls = append $urls (printf "%s://%s-%d.%s.%s.svc:2379" $scheme $service $index $service $.Release.Namespace) -}}
{{- end -}}
{{ join "," $urls }}
{{- end -}}
{{- end }}

{{/* What the schema cannot say: settings that contradict each other. */}}
{{- define "cachefs.check" -}}
{{- $etcd := .Values.etcd -}}
{{- if and (eq $etcd.mode "external") (not $etcd.external.endpoints) }}{{ fail "etcd.external.endpoints: at least one address is needed with etcd.mode external" }}{{ end -}}
{{- if and $etcd.external.user (not $etcd.external.passwordSecret) }}{{ fail "etcd.external.passwordSecret: needed with etcd.external.user" }}{{ end -}}
{{- if and .Values.controller.enabled (eq .Values.controller.state "etcd") (eq $etcd.mode "none") }}{{ fail "controller.state: with etcd.mode none the records of volumes need a PersistentVolumeClaim; name one here, or set controller.enabled to false" }}{{ end -}}
{{- if and .Values.controller.enabled (ne .Values.controller.state "etcd") (gt (int .Values.controller.replicas) 1) }}{{ fail "controller.replicas: more than one needs controller.state etcd" }}{{ end -}}
{{- if and .Values.controller.enabled (eq .Values.controller.state "etcd") (eq $etcd.mode "bundled") (not $etcd.bundled.persistence.enabled) }}{{ fail "etcd.bundled.persistence.enabled: the records of volumes would be lost with the pod; set it to true, or controller.enabled to false" }}{{ end -}}
{{- if and (ne $etcd.mode "none") (eq .Values.peers.auth "tls") (eq .Values.tls.mode "none") }}{{ fail "peers.auth: tls needs certificates; set tls.mode, or peers.auth to secret" }}{{ end -}}
{{- if eq .Values.tls.mode "existing" -}}
{{- if and (ne $etcd.mode "none") (eq .Values.peers.auth "tls") (not .Values.tls.existing.peer) }}{{ fail "tls.existing.peer: name the Secret with the certificate of peers" }}{{ end -}}
{{- if and (eq $etcd.mode "bundled") (or (not .Values.tls.existing.etcdServer) (not .Values.tls.existing.etcdClient)) }}{{ fail "tls.existing.etcdServer, tls.existing.etcdClient: name the Secrets with the certificates of etcd" }}{{ end -}}
{{- end -}}
{{- if and .Values.node.labelNodes (eq $etcd.mode "none") }}{{ fail "node.labelNodes: what a node holds is counted for the cluster only; it needs etcd" }}{{ end -}}
{{- if and .Values.controller.enabled .Values.controller.storageCapacity (not .Values.csi.topology) }}{{ fail "controller.storageCapacity: needs csi.topology true; csi-provisioner tells the scheduler nothing for nodes without a place, and pods would wait for ever" }}{{ end -}}
{{- if and .Values.snapshotClasses (not .Values.controller.snapshotter) }}{{ fail "snapshotClasses: needs controller.snapshotter true" }}{{ end -}}
{{- $metrics := .Values.metrics -}}
{{- range $monitor := list "serviceMonitor" "podMonitor" -}}
{{- if and (get $metrics $monitor).enabled (not $metrics.enabled) }}{{ fail (printf "metrics.%s: nothing is served; set metrics.enabled to true" $monitor) }}{{ end -}}
{{- end -}}
{{- if and $metrics.serviceMonitor.enabled $metrics.podMonitor.enabled }}{{ fail "metrics.podMonitor: every node would be scraped twice; set metrics.podMonitor.enabled or metrics.serviceMonitor.enabled to false" }}{{ end -}}
{{- if and $metrics.rules.enabled (not (or $metrics.serviceMonitor.enabled $metrics.podMonitor.enabled)) }}{{ fail "metrics.rules: the alerts are for what a monitor brings; set metrics.serviceMonitor.enabled or metrics.podMonitor.enabled to true" }}{{ end -}}
{{- if and .Values.metrics.enabled (eq (int .Values.metrics.port) (int .Values.node.peerPort)) }}{{ fail "metrics.port: is that of node.peerPort" }}{{ end -}}
{{- if and .Values.s3.caFile (not .Values.s3.caConfigMap) }}{{ fail "s3.caFile: needs s3.caConfigMap, where it is a key" }}{{ end -}}
{{- $surge := .Values.node.updateStrategy.maxSurge | toString | trimSuffix "%" | int -}}
{{- $away := .Values.node.updateStrategy.maxUnavailable | toString | trimSuffix "%" | int -}}
{{- if and (gt $surge 0) (gt $away 0) }}{{ fail "node.updateStrategy: one of maxSurge and maxUnavailable has to be 0" }}{{ end -}}
{{- if and (eq $surge 0) (eq $away 0) }}{{ fail "node.updateStrategy: maxSurge and maxUnavailable cannot both be 0" }}{{ end -}}
{{- if and (gt $surge 0) .Values.node.peerPort .Values.node.hostNetwork }}{{ fail "node.updateStrategy.maxSurge: two pods cannot have node.peerPort on one node's network; set maxSurge to 0 and maxUnavailable to 1" }}{{ end -}}
{{- if and (gt $surge 0) .Values.metrics.enabled .Values.node.hostNetwork }}{{ fail "node.updateStrategy.maxSurge: two pods cannot have metrics.port on one node's network; set maxSurge to 0 and maxUnavailable to 1" }}{{ end -}}
{{- end }}
