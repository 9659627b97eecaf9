{{/* Parts that several pods share. */}}

{{/* Start of the spec of a pod of the nodes. */}}
{{- define "cachefs.nodePod" -}}
priorityClassName: {{ .Values.nodes.priorityClassName }}
nodeSelector:
  kubernetes.io/os: linux
  {{- with .Values.nodes.nodeSelector }}{{ toYaml . | nindent 2 }}{{ end }}
{{- with .Values.nodes.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodes.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- include "cachefs.pullSecrets" . }}
{{- end }}

{{- define "cachefs.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* metadata of a pod template. Arguments: dict "top" $ "part" name */}}
{{- define "cachefs.podMetadata" -}}
labels:
  {{- include "cachefs.labels" . | nindent 2 }}
  {{- with .top.Values.podLabels }}{{ toYaml . | nindent 2 }}{{ end }}
annotations:
  kubectl.kubernetes.io/default-container: {{ .container | default .part }}
  {{- if has .part (list "keeper" "node" "csi") }}
  # The cluster autoscaler would evict these together with the pods that read, which may take longer to end.
  cluster-autoscaler.kubernetes.io/enable-ds-eviction: "false"
  {{- end }}
  {{- with .top.Values.podAnnotations }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{/* An unprivileged container. Arguments: dict "top" $ "capabilities" (list of those that are added) "onNode" bool */}}
{{- define "cachefs.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- with .capabilities }}
  add: {{ toJson . }}
  {{- end }}
{{- if .onNode }}
{{- with .top.Values.seLinuxOptions }}
seLinuxOptions: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{/* Variables with which a command finds etcd. */}}
{{- define "cachefs.etcdEnv" -}}
- name: CACHEFS_ETCD
  value: {{ include "cachefs.etcdEndpoints" . | quote }}
- name: CACHEFS_CLUSTER
  value: {{ include "cachefs.cluster" . | quote }}
{{- if include "cachefs.etcdClientTls" . }}
- name: CACHEFS_ETCD_CA
  value: /etc/cachefs/etcd-tls/ca.crt
{{- if eq .Values.etcd.mode "bundled" }}
- name: CACHEFS_ETCD_CERT
  value: /etc/cachefs/etcd-tls/tls.crt
- name: CACHEFS_ETCD_KEY
  value: /etc/cachefs/etcd-tls/tls.key
{{- else if .Values.etcd.external.clientCertificate }}
- name: CACHEFS_ETCD_CERT
  value: /etc/cachefs/etcd-tls/tls.crt
- name: CACHEFS_ETCD_KEY
  value: /etc/cachefs/etcd-tls/tls.key
{{- end }}
{{- end }}
{{- if and (eq .Values.etcd.mode "external") .Values.etcd.external.user }}
- name: CACHEFS_ETCD_USER
  value: {{ .Values.etcd.external.user | quote }}
- name: CACHEFS_ETCD_PASSWORD_FILE
  value: /etc/cachefs/etcd-password/password
{{- end }}
{{- end }}

{{/* The files of these variables. Groups may read them: the pod's fsGroup is that of cachefs. */}}
{{- define "cachefs.etcdMounts" -}}
{{- if include "cachefs.etcdClientTls" . }}
- name: etcd-tls
  mountPath: /etc/cachefs/etcd-tls
  readOnly: true
{{- end }}
{{- if and (eq .Values.etcd.mode "external") .Values.etcd.external.user }}
- name: etcd-password
  mountPath: /etc/cachefs/etcd-password
  readOnly: true
{{- end }}
{{- end }}

{{- define "cachefs.etcdVolumes" -}}
{{- with include "cachefs.etcdClientTls" . }}
- name: etcd-tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- if and (eq .Values.etcd.mode "external") .Values.etcd.external.user }}
- name: etcd-password
  secret:
    secretName: {{ .Values.etcd.external.passwordSecret }}
    defaultMode: 0440
    items: [{key: password, path: password}]
{{- end }}
{{- end }}

{{/* Where a pod is, as far as Kubernetes tells it (the label comes with 1.35; before that it is empty). */}}
{{- define "cachefs.zoneEnv" -}}
- name: {{ .variable }}
  {{- if .top.Values.node.zone }}
  value: {{ .top.Values.node.zone | quote }}
  {{- else }}
  valueFrom: {fieldRef: {fieldPath: "metadata.labels['topology.kubernetes.io/zone']"}}
  {{- end }}
{{- end }}

{{/* Programs of readiness probes: exit code 0 when the keeper answers, or knows a node service. */}}
{{- define "cachefs.keeperAnswers" -}}
from cachefs.keeper.client import KeeperClient; KeeperClient('{{ include "cachefs.runtimeDir" . }}/keeper.sock', 5).status()
{{- end }}

{{- define "cachefs.runnerConnected" -}}
import sys; from cachefs.keeper.client import KeeperClient; sys.exit(KeeperClient('{{ include "cachefs.runtimeDir" . }}/keeper.sock', 5).status().runner is None)
{{- end }}

{{/* The rest of a sidecar of the controller. A leader that cannot renew its lease is restarted. */}}
{{- define "cachefs.sidecar" -}}
ports:
  - {name: http-{{ .port }}, containerPort: {{ .port }}}
securityContext: {{- include "cachefs.containerSecurity" . | nindent 2 }}
{{- if .many }}
livenessProbe:
  httpGet: {path: /healthz/leader-election, port: {{ .port }}}
  initialDelaySeconds: 30
  periodSeconds: 20
  timeoutSeconds: 10
{{- end }}
resources: {{- toYaml .resources | nindent 2 }}
volumeMounts:
  - {name: socket, mountPath: /csi}
{{- end }}

{{/* Annotations of what runs before an uninstall. Argument: the weight. A check that failed stays, for its log. */}}
{{- define "cachefs.uninstallHook" -}}
helm.sh/hook: pre-delete
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
helm.sh/hook-output-log-policy: hook-failed
{{- end }}

{{/* The settings of the agent of a node. The plugin has the same as the node service: what it asks for fits the agent. */}}
{{- define "cachefs.agentEnv" -}}
{{- $node := .Values.node -}}
- name: CACHEFS_RUNTIME_DIR
  value: {{ include "cachefs.runtimeDir" . }}/node
- name: CACHEFS_CACHE_DIR
  value: {{ include "cachefs.cacheDir" . }}
- name: CACHEFS_CACHE_SIZE
  value: {{ .Values.cache.size | quote }}
- name: CACHEFS_SHM_SIZE
  value: {{ .Values.cache.shmSize | quote }}
- name: CACHEFS_SHM_DIR
  value: /dev/shm
- name: CACHEFS_MEMORY_LIMIT
  value: {{ .Values.cache.memoryLimit | quote }}
- name: CACHEFS_LOG_LEVEL
  value: {{ .Values.log.level }}
- name: CACHEFS_LOG_FORMAT
  value: {{ .Values.log.format }}
{{- if ne .Values.etcd.mode "none" }}
{{ include "cachefs.etcdEnv" . }}
- name: CACHEFS_NODE_NAME
  value: $(NODE_NAME)
{{ include "cachefs.zoneEnv" (dict "top" . "variable" "CACHEFS_ZONE") }}
{{- if $node.peerPort }}
- name: PEER_ADDRESS
  valueFrom: {fieldRef: {fieldPath: {{ ternary "status.hostIP" "status.podIP" $node.hostNetwork }}}}
- name: CACHEFS_ADVERTISE
  value: $(PEER_ADDRESS):{{ $node.peerPort }}
{{- end }}
{{- if include "cachefs.peerTls" . }}
- name: CACHEFS_PEER_CERT
  value: /etc/cachefs/peer-tls/tls.crt
- name: CACHEFS_PEER_KEY
  value: /etc/cachefs/peer-tls/tls.key
- name: CACHEFS_PEER_CA
  value: /etc/cachefs/peer-tls/ca.crt
{{- else if include "cachefs.peerSecret" . }}
- name: CACHEFS_PEER_SECRET_FILE
  value: /etc/cachefs/peer-secret/secret
{{- else }}
- name: CACHEFS_PEER_INSECURE
  value: "true"
{{- end }}
{{- end }}
{{- range $key, $value := $node.settings }}
- name: CACHEFS_{{ $key | upper | replace "-" "_" }}
  value: {{ $value | quote }}
{{- end }}
{{- with $node.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "cachefs.agentMounts" -}}
{{- if ne .Values.etcd.mode "none" }}
{{- include "cachefs.etcdMounts" . }}
{{- if include "cachefs.peerTls" . }}
- name: peer-tls
  mountPath: /etc/cachefs/peer-tls
  readOnly: true
{{- else if include "cachefs.peerSecret" . }}
- name: peer-secret
  mountPath: /etc/cachefs/peer-secret
  readOnly: true
{{- end }}
{{- end }}
{{- include "cachefs.caMount" . }}
{{- end }}

{{- define "cachefs.agentVolumes" -}}
{{- if ne .Values.etcd.mode "none" }}
{{- include "cachefs.etcdVolumes" . }}
{{- with include "cachefs.peerTls" . }}
- name: peer-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with include "cachefs.peerSecret" . }}
- name: peer-secret
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- include "cachefs.caVolume" . }}
{{- end }}

{{/* Authorities for S3 endpoints: files for `caBundle`. */}}
{{- define "cachefs.caMount" }}
{{- if .Values.s3.caConfigMap }}
- name: s3-ca
  mountPath: /etc/cachefs/s3-ca
  readOnly: true
{{- end }}
{{- end }}

{{- define "cachefs.caVolume" }}
{{- with .Values.s3.caConfigMap }}
- name: s3-ca
  configMap: {name: {{ . }}}
{{- end }}
{{- end }}

{{/* How buckets are reached whose class says nothing else: for plugin and controller. */}}
{{- define "cachefs.s3Env" -}}
- name: CACHEFS_ENDPOINT_URL
  value: {{ .Values.s3.endpoint | quote }}
- name: CACHEFS_REGION
  value: {{ .Values.s3.region | quote }}
- name: CACHEFS_ADDRESSING
  value: {{ .Values.s3.addressing }}
{{- if .Values.s3.caFile }}
- name: CACHEFS_CA_BUNDLE
  value: /etc/cachefs/s3-ca/{{ .Values.s3.caFile }}
{{- end }}
{{- end }}
