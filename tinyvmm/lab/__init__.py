"""The lab: a KVM that can run Linux, where this computer's cannot."""
