//! Certificates and keys from PEM files to rustls configurations, live: a renewed file is taken over without a restart.
//!
//! [`ServerTls`] is what a listener holds, [`ClientTls`] what an upstream holds. Both are opened once, which reports a
//! bad file to the operator, and asked for their current configuration at each handshake. rustls with ring, TLS 1.2
//! (RFC 5246) and 1.3 (RFC 8446). Making certificates is in [`issue`], what a failed handshake means in [`explain`].

pub mod explain;
pub mod issue;
mod live;
mod pem;
mod subject;
mod validity;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion};
use thiserror::Error;

use crate::clock::UnixMillis;
pub use live::{EXPIRY_NOTICE, Ends, Live, Source};
pub use subject::{common_name, subject};

/// The live TLS configuration of a listener.
pub type ServerTls = Live<ServerSettings>;
/// The live TLS configuration of an upstream.
pub type ClientTls = Live<ClientSettings>;

/// What a TLS listener is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSettings {
    /// PEM file with the server's certificate, then its intermediates.
    pub certificate: PathBuf,
    /// PEM file with the certificate's key: PKCS #8, PKCS #1 or SEC1, not encrypted.
    pub key: PathBuf,
    /// PEM file with the authorities whose client certificates are accepted; `None` asks for no client certificate.
    pub client_ca: Option<PathBuf>,
    /// Refuse clients that show no certificate; has a meaning only with `client_ca`.
    pub require_client_certificate: bool,
}

/// What a TLS connection to an upstream is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientSettings {
    /// PEM file with the authorities to trust, in place of the system's.
    pub ca: Option<PathBuf>,
    /// Client certificate and key, for servers that ask for one.
    pub identity: Option<ClientIdentity>,
    /// The name to ask for and to check, in place of the host that is connected to.
    pub server_name: Option<String>,
    /// Application protocols to offer (RFC 7301), as in `x-amzn-mqtt-ca`; most brokers want none.
    pub alpn: Vec<String>,
}

/// The certificate by which this gateway proves who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientIdentity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl ClientSettings {
    /// The name to ask for and to check when connecting to `host`.
    ///
    /// # Errors
    /// [`TlsError::ServerName`] where it is neither a DNS name nor an IP address.
    pub fn server_name(&self, host: &str) -> Result<ServerName<'static>, TlsError> {
        let name = self.server_name.as_deref().unwrap_or(host);
        let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
        ServerName::try_from(bare.to_owned()).map_err(|_| TlsError::ServerName(name.into()))
    }
}

/// Why certificates or keys cannot be used: the operator's files, with what to do about each.
#[derive(Debug, Error)]
pub enum TlsError {
    #[error("cannot read {path}; check the path and that this user may read it", path = .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is larger than 1 MiB, which no certificate or key file is; check the path", path = .path.display())]
    TooLarge { path: PathBuf },
    #[error("{path} holds no certificate (a line `-----BEGIN CERTIFICATE-----`){hint}", path = .path.display())]
    NoCertificate { path: PathBuf, hint: &'static str },
    #[error("{path} holds no private key (a line `-----BEGIN PRIVATE KEY-----`){hint}", path = .path.display())]
    NoKey { path: PathBuf, hint: &'static str },
    #[error(
        "the key in {path} is encrypted, and a gateway that starts alone has nobody to ask for the passphrase; \
         decrypt it with `openssl pkey -in {path} -out NEW` and protect NEW by its file mode",
        path = .path.display()
    )]
    EncryptedKey { path: PathBuf },
    #[error("{path} is not well-formed PEM: {problem}", path = .path.display())]
    Malformed { path: PathBuf, problem: String },
    #[error(
        "the key in {key} does not belong to the certificate in {certificate}; the server's own certificate must be the \
         first in its file, and both files must come from the same issue",
        certificate = .certificate.display(), key = .key.display()
    )]
    KeyMismatch { certificate: PathBuf, key: PathBuf },
    #[error("certificate {certificate} with key {key} cannot be used", certificate = .certificate.display(), key = .key.display())]
    Unusable { certificate: PathBuf, key: PathBuf, source: rustls::Error },
    #[error("{path} cannot be used as a set of authorities: {problem}", path = .path.display())]
    Authorities { path: PathBuf, problem: String },
    #[error(
        "this system has no root certificates to check servers with ({problem}); install them (package \
         `ca-certificates`) or name the authority's file in `tls.ca`"
    )]
    NoSystemRoots { problem: String },
    #[error("`{0}` is neither a DNS name nor an IP address, so no certificate can be checked against it")]
    ServerName(String),
    #[error("this build has no TLS 1.2 or 1.3 to offer")]
    Protocol(#[source] rustls::Error),
    #[error("cannot make a certificate")]
    Issue(#[from] rcgen::Error),
    #[error("cannot write {path}; check that the directory exists and this user may write there", path = .path.display())]
    Write { path: PathBuf, source: std::io::Error },
}

impl Source for ServerSettings {
    type Config = ServerConfig;

    fn files(&self) -> Vec<&Path> {
        let mut files: Vec<&Path> = vec![&self.certificate, &self.key];
        files.extend(self.client_ca.as_deref());
        files
    }

    fn certificate(&self) -> Option<&Path> {
        Some(&self.certificate)
    }

    fn authorities(&self) -> Option<&Path> {
        self.client_ca.as_deref()
    }

    fn build(&self) -> Result<(ServerConfig, Ends), TlsError> {
        let mut ends = Ends::default();
        let provider = provider();
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(VERSIONS)
            .map_err(TlsError::Protocol)?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let roots;
                (roots, ends.authorities) = pem::authorities(path)?;
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier =
                    if self.require_client_certificate { verifier } else { verifier.allow_unauthenticated() };
                let verifier = verifier
                    .build()
                    .map_err(|error| TlsError::Authorities { path: path.clone(), problem: error.to_string() })?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let (chain, key) = pem::identity(&self.certificate, &self.key)?;
        ends.certificate = expiry_of(&chain);
        // No ALPN on this side: a client that offers `mqtt` is served as well as one that offers nothing.
        let config =
            builder.with_single_cert(chain, key).map_err(|error| unusable(&self.certificate, &self.key, error))?;
        Ok((config, ends))
    }
}

impl Source for ClientSettings {
    type Config = ClientConfig;

    fn files(&self) -> Vec<&Path> {
        let mut files: Vec<&Path> = self.ca.as_deref().into_iter().collect();
        if let Some(identity) = &self.identity {
            files.extend([identity.certificate.as_path(), identity.key.as_path()]);
        }
        files
    }

    fn certificate(&self) -> Option<&Path> {
        self.identity.as_ref().map(|identity| identity.certificate.as_path())
    }

    fn authorities(&self) -> Option<&Path> {
        self.ca.as_deref()
    }

    fn build(&self) -> Result<(ClientConfig, Ends), TlsError> {
        let (roots, authorities) = match &self.ca {
            Some(path) => pem::authorities(path)?,
            None => (system_roots()?, Vec::new()),
        };
        let mut ends = Ends { certificate: None, authorities };
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(TlsError::Protocol)?
            .with_root_certificates(roots);
        let mut config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some(ClientIdentity { certificate, key: key_path }) => {
                let (chain, key) = pem::identity(certificate, key_path)?;
                ends.certificate = expiry_of(&chain);
                builder.with_client_auth_cert(chain, key).map_err(|error| unusable(certificate, key_path, error))?
            }
        };
        config.alpn_protocols = self.alpn.iter().map(|protocol| protocol.clone().into_bytes()).collect();
        Ok((config, ends))
    }
}

/// Newest first; nothing below TLS 1.2.
const VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

/// ring, named where it is used: rustls' process-wide default would be a global.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // Systems carry a few certificates that webpki refuses; the rest is what counts.
    let (added, _refused) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let problem = found.errors.first().map_or_else(|| "none found".into(), ToString::to_string);
        return Err(TlsError::NoSystemRoots { problem });
    }
    Ok(roots)
}

/// When the first certificate of `chain`, the one that speaks for the key, stops being valid.
fn expiry_of(chain: &[CertificateDer<'_>]) -> Option<UnixMillis> {
    chain.first().and_then(|certificate| validity::not_after(certificate))
}

fn unusable(certificate: &Path, key: &Path, error: rustls::Error) -> TlsError {
    let (certificate, key) = (certificate.into(), key.into());
    match error {
        rustls::Error::InconsistentKeys(_) => TlsError::KeyMismatch { certificate, key },
        source => TlsError::Unusable { certificate, key, source },
    }
}

#[cfg(test)]
mod tests;
