"""What tests of several levels share: a real S3 server and a proxy that injects faults in front of it."""
