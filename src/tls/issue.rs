//! Making certificates: a private authority and what it signs, for the demo, for a gateway's first boot and for tests.
//!
//! Not a public key infrastructure: no revocation, no requests, one authority in one directory. ECDSA P-256 keys,
//! X.509 version 3 (RFC 5280).

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::server::ParsedCertificate;

use super::{ClientIdentity, ServerSettings, TlsError, pem, validity};
use crate::clock::{RELEASED, UnixMillis};

/// The names under which a program on the same machine is reached.
pub const LOOPBACK_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// How long the authority is valid: longer than the hardware, for it must be installed by hand elsewhere.
pub const AUTHORITY_VALIDITY: Duration = Duration::from_secs(20 * 365 * 86_400);

/// How long a certificate is valid. Apple's systems refuse more than 825 days even from an authority the user installed.
pub const CERTIFICATE_VALIDITY: Duration = Duration::from_secs(800 * 86_400);

/// A certificate with less than this left is made anew by [`Authority::ensure`].
pub const RENEW_BEFORE: Duration = Duration::from_secs(60 * 86_400);

/// What a certificate may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    Server,
    Client,
}

/// A certificate and its key, as files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Issued {
    /// Settings of a listener that shows this certificate and asks for none.
    pub fn server_settings(&self) -> ServerSettings {
        ServerSettings {
            certificate: self.certificate.clone(),
            key: self.key.clone(),
            client_ca: None,
            require_client_certificate: false,
        }
    }

    pub fn client_identity(&self) -> ClientIdentity {
        ClientIdentity { certificate: self.certificate.clone(), key: self.key.clone() }
    }
}

/// A private certificate authority that lives in a directory, as `ca.pem` and `ca.key`.
#[derive(Debug)]
pub struct Authority {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Loads the authority of `directory`, or makes it (and the directory, for this user only) on first use.
    ///
    /// # Errors
    /// [`TlsError`] names the file that cannot be read, used or written.
    pub fn open(directory: &Path, now: UnixMillis) -> Result<Self, TlsError> {
        make_private_directory(directory)?;
        let (certificate, key_path) = (directory.join("ca.pem"), directory.join("ca.key"));
        // Both or neither: half an authority, as after a crash in between, is made anew.
        if certificate.exists() && key_path.exists() {
            let text =
                fs::read_to_string(&key_path).map_err(|source| TlsError::Read { path: key_path.clone(), source })?;
            let key = KeyPair::from_pem(&text)
                .map_err(|error| TlsError::Malformed { path: key_path, problem: error.to_string() })?;
            return Ok(Self { directory: directory.into(), issuer: Issuer::new(authority_params(&key, now), key) });
        }
        let key = KeyPair::generate()?;
        let params = authority_params(&key, now);
        let made = params.self_signed(&key)?;
        write_file(&key_path, &key.serialize_pem(), PRIVATE)?;
        write_file(&certificate, &made.pem(), PUBLIC)?;
        Ok(Self { directory: directory.into(), issuer: Issuer::new(params, key) })
    }

    /// The authority's own certificate: the file that peers name as their CA.
    pub fn certificate(&self) -> PathBuf {
        self.directory.join("ca.pem")
    }

    /// The certificate `{stem}.pem` with the key `{stem}.key`: the one that is there while it is valid long enough and
    /// holds all of `names`, otherwise a new one. `names` are DNS names or IP addresses; the first is also its common name.
    ///
    /// # Errors
    /// [`TlsError`] for a name that no certificate can hold, or a file that cannot be written.
    pub fn ensure(&self, stem: &str, usage: Usage, names: &[&str], now: UnixMillis) -> Result<Issued, TlsError> {
        let issued = Issued {
            certificate: self.directory.join(format!("{stem}.pem")),
            key: self.directory.join(format!("{stem}.key")),
        };
        if !is_usable(&issued, names, now) {
            let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
            params.distinguished_name = distinguished_name(names.first().copied().unwrap_or(stem));
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![match usage {
                Usage::Server => ExtendedKeyUsagePurpose::ServerAuth,
                Usage::Client => ExtendedKeyUsagePurpose::ClientAuth,
            }];
            params.use_authority_key_identifier_extension = true;
            set_validity(&mut params, now, CERTIFICATE_VALIDITY);
            let key = KeyPair::generate()?;
            let made = params.signed_by(&key, &self.issuer)?;
            write_file(&issued.key, &key.serialize_pem(), PRIVATE)?;
            write_file(&issued.certificate, &made.pem(), PUBLIC)?;
        }
        Ok(issued)
    }
}

/// Keys are for this user alone.
const PRIVATE: u32 = 0o600;
/// Certificates are shown to every peer anyway, and clients of other users need the authority's.
const PUBLIC: u32 = 0o644;

/// The name follows from the key, so that it is the same when the key is loaded again, and two gateways' authorities
/// are not taken for each other.
fn authority_params(key: &KeyPair, now: UnixMillis) -> CertificateParams {
    let mut params = CertificateParams::default();
    let point = key.public_key_raw();
    let tail: String = point[point.len().saturating_sub(4)..].iter().map(|byte| format!("{byte:02x}")).collect();
    params.distinguished_name = distinguished_name(&format!("Fieldgate local authority {tail}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, now, AUTHORITY_VALIDITY);
    params
}

fn distinguished_name(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

/// Valid from a day ago, for peers whose clock is behind. A gateway whose clock was not yet set at its first boot counts
/// from this release, so that its certificate is still valid once the clock is right.
fn set_validity(params: &mut CertificateParams, now: UnixMillis, validity: Duration) {
    let since_epoch = Duration::from_millis(u64::try_from(now.max(RELEASED).0).unwrap_or(0));
    let start = SystemTime::UNIX_EPOCH + since_epoch;
    params.not_before = (start - Duration::from_secs(86_400)).into();
    params.not_after = (start + validity).into();
}

fn is_usable(issued: &Issued, names: &[&str], now: UnixMillis) -> bool {
    let Ok((chain, _key)) = pem::identity(&issued.certificate, &issued.key) else { return false };
    let Some(certificate) = chain.first() else { return false };
    let lasts = validity::not_after(certificate).is_some_and(|end| end.since(now.max(RELEASED)) > RENEW_BEFORE);
    let Ok(parsed) = ParsedCertificate::try_from(certificate) else { return false };
    lasts
        && names.iter().all(|name| {
            rustls::pki_types::ServerName::try_from(*name)
                .is_ok_and(|name| rustls::client::verify_server_name(&parsed, &name).is_ok())
        })
}

fn make_private_directory(directory: &Path) -> Result<(), TlsError> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|source| TlsError::Write { path: directory.into(), source })
}

/// Writes beside `path` and renames: whoever reads meanwhile, and a crash, see the old file or the new one.
fn write_file(path: &Path, text: &str, mode: u32) -> Result<(), TlsError> {
    let beside = path.with_extension("new");
    let write = || {
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // `create_new` with the mode: the key is never readable by others, not even for a moment.
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|source| TlsError::Write { path: path.into(), source })
}
