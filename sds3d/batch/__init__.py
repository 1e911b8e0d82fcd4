"""Many runs from one file, on this machine or on many: `sds3d batch`."""
