{{/* What each service account may do, and why. Nothing else asks the Kubernetes API. */}}

{{/* cachefs node --label-node: reads and changes the labels of its node. RBAC cannot say "its own node only". */}}
{{- define "cachefs.nodeRules" -}}
- apiGroups: [""]
  resources: [nodes]
  verbs: [get, patch]
{{- end }}

{{/* cachefs csi --events: events of pods that wait, wherever they are, and their progress. */}}
{{- define "cachefs.csiRules" -}}
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
{{- end }}

{{/* csi-provisioner, csi-resizer and csi-snapshotter: what their deploy/kubernetes/rbac.yaml list for drivers without
attachment, group snapshots and classes of volume attributes. */}}
{{- define "cachefs.controllerRules" -}}
- apiGroups: [""]
  resources: [persistentvolumes]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, list, watch, update]
- apiGroups: [""]
  resources: [events]
  verbs: [list, watch, create, update, patch]
- apiGroups: [storage.k8s.io]
  resources: [storageclasses]
  verbs: [get, list, watch]
{{- if .Values.csi.topology }}
- apiGroups: [storage.k8s.io]
  resources: [csinodes]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [nodes]
  verbs: [get, list, watch]
{{- end }}
{{- if .Values.controller.resizer }}
- apiGroups: [""]
  resources: [persistentvolumeclaims/status]
  verbs: [patch]
# csi-resizer watches these classes where the cluster has them, whether the driver uses them or not.
- apiGroups: [storage.k8s.io]
  resources: [volumeattributesclasses]
  verbs: [get, list, watch]
{{- end }}
{{- if .Values.controller.snapshotter }}
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshots]
  verbs: [get, list, watch, update]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotclasses]
  verbs: [get, list, watch]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotcontents]
  verbs: [get, list, watch, update, patch]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotcontents/status]
  verbs: [update, patch]
{{- end }}
{{- if .Values.controller.readAllSecrets }}
- apiGroups: [""]
  resources: [secrets]
  verbs: [get]
{{- end }}
{{- end }}

{{/* In the namespace of the release: leases of leaders, and the capacity that the scheduler reads. */}}
{{- define "cachefs.controllerOwnRules" -}}
{{- if gt (int .Values.controller.replicas) 1 }}
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [get, watch, list, delete, update, create]
{{- end }}
{{- if .Values.controller.storageCapacity }}
- apiGroups: [storage.k8s.io]
  resources: [csistoragecapacities]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get]
- apiGroups: [apps]
  resources: [replicasets]
  verbs: [get]
{{- end }}
{{- end }}

{{/* A ClusterRole and its binding. Arguments: dict "top" $ "part" name "rules" list */}}
{{- define "cachefs.clusterRole" }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: {{ include "cachefs.name" .top }}-{{ .part }}
  labels: {{- include "cachefs.labels" . | nindent 4 }}
rules: {{- toYaml .rules | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {{ include "cachefs.name" .top }}-{{ .part }}
  labels: {{- include "cachefs.labels" . | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {{ include "cachefs.name" .top }}-{{ .part }}
subjects:
  - kind: ServiceAccount
    name: {{ include "cachefs.name" .top }}-{{ .part }}
    namespace: {{ .top.Release.Namespace }}
{{- end }}

{{/* Binds a Role of this name to the controller. Arguments: dict "top" $ "name" name "namespace" where */}}
{{- define "cachefs.roleBinding" }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ .name }}
  namespace: {{ .namespace }}
  labels: {{- include "cachefs.labels" (dict "top" .top "part" "controller") | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ .name }}
subjects:
  - kind: ServiceAccount
    name: {{ include "cachefs.name" .top }}-controller
    namespace: {{ .top.Release.Namespace }}
{{- end }}
