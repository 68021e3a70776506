//! PEM files (RFC 7468) to certificates, keys and sets of authorities, with errors that say what the file holds instead.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::{TlsError, validity};
use crate::clock::UnixMillis;

/// The most that is read of a file. A bundle of every public authority is a quarter of this.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// The certificate chain of `certificate` and the key of `key`.
pub(super) fn identity(
    certificate: &Path,
    key: &Path,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    Ok((certificates(certificate)?, private_key(key)?))
}

/// Every certificate of `path`, in the order of the file; at least one.
pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path)?;
    let certificates = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| TlsError::Malformed { path: path.into(), problem: error.to_string() })?;
    if certificates.is_empty() {
        return Err(TlsError::NoCertificate { path: path.into(), hint: hint(&text) });
    }
    Ok(certificates)
}

/// The certificates of `path` as the authorities to trust, and when they stop being valid, the first first.
pub(super) fn authorities(path: &Path) -> Result<(RootCertStore, Vec<UnixMillis>), TlsError> {
    let mut roots = RootCertStore::empty();
    let mut ends = Vec::new();
    for (index, certificate) in certificates(path)?.into_iter().enumerate() {
        ends.extend(validity::not_after(&certificate));
        roots.add(certificate).map_err(|error| TlsError::Authorities {
            path: path.into(),
            problem: format!("certificate {} of the file: {error}", index + 1),
        })?;
    }
    ends.sort_unstable();
    Ok((roots, ends))
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    use rustls::pki_types::pem::Error;
    let text = read(path)?;
    if contains(&text, b"ENCRYPTED PRIVATE KEY") || contains(&text, b"Proc-Type: 4,ENCRYPTED") {
        return Err(TlsError::EncryptedKey { path: path.into() });
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| match error {
        Error::NoItemsFound => TlsError::NoKey { path: path.into(), hint: hint(&text) },
        error => TlsError::Malformed { path: path.into(), problem: error.to_string() },
    })
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|source| TlsError::Read { path: path.into(), source })?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(TlsError::TooLarge { path: path.into() });
    }
    Ok(bytes)
}

/// What a file without the wanted section holds instead, where that can be told.
fn hint(bytes: &[u8]) -> &'static str {
    match bytes {
        [] => "; it is empty",
        // A DER file begins with a SEQUENCE that has a two-octet length.
        [0x30, 0x82, ..] => {
            "; it looks like DER, convert it with `openssl x509 -inform der` or `openssl pkey -inform der`"
        }
        _ if contains(bytes, b"BEGIN CERTIFICATE REQUEST") => {
            "; it holds a signing request, which an authority must first sign"
        }
        _ if contains(bytes, b"PRIVATE KEY-----") => "; it holds a private key, are the two files swapped?",
        _ if contains(bytes, b"BEGIN CERTIFICATE-----") => "; it holds a certificate, are the two files swapped?",
        _ => "",
    }
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}
