"""The control plane of a job: membership, leases, barriers, checkpoints. Never on the path of tensors."""
