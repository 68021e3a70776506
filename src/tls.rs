//! Certificates and keys from PEM files to rustls configurations.
