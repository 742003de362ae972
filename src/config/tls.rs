//! `SSL_CERTFILE` and `SSL_KEYFILE`: the server's certificate, read and checked.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{Error, ServerConfig};

use super::keys_file::{Stamp, stamp};
use super::table;

/// The two files and what was in them.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    pub certificate: PathBuf,
    /// `None`: the certificate's file holds the key, too.
    pub key: Option<PathBuf>,
    /// They are read again when they change (`ENABLE_SSL_REFRESH`).
    pub refresh: bool,
    pub config: Arc<ServerConfig>,
    /// Of the certificate's file and the key's, before they were read.
    pub stamps: Vec<Stamp>,
}

/// What is wrong with a file.
#[derive(Debug)]
pub struct TlsError {
    /// The setting that names it.
    pub setting: &'static str,
    /// With the file's path.
    pub message: String,
}

impl TlsFiles {
    /// # Errors
    /// A file that cannot be read or holds no certificate or key, and a key of another certificate.
    pub fn read(certificate: PathBuf, key: Option<PathBuf>, refresh: bool) -> Result<Self, TlsError> {
        let key_path = key.as_deref().unwrap_or(&certificate);
        let stamps = vec![stamp(&certificate), stamp(key_path)];
        let config = Arc::new(config(&certificate, key_path)?);
        Ok(Self { certificate, key, refresh, config, stamps })
    }

    /// The file with the key.
    pub fn key_path(&self) -> &Path {
        self.key.as_deref().unwrap_or(&self.certificate)
    }

    /// The same files as they are now.
    ///
    /// # Errors
    /// As [`TlsFiles::read`].
    pub fn again(&self) -> Result<Arc<ServerConfig>, TlsError> {
        config(&self.certificate, self.key_path()).map(Arc::new)
    }
}

fn config(certificate: &Path, key: &Path) -> Result<ServerConfig, TlsError> {
    let wrong = |setting: &'static str, path: &Path, what: &str| TlsError { setting, message: format!("{}: {what}", path.display()) };
    let of_certificate = |what: &str| wrong(table::SSL_CERTFILE.name, certificate, what);
    // Where one file holds both, its setting is the other one.
    let of_key = |what: &str| wrong(if key == certificate { table::SSL_CERTFILE.name } else { table::SSL_KEYFILE.name }, key, what);
    let pem = std::fs::read(certificate).map_err(|error| of_certificate(&error.to_string()))?;
    let chain = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| of_certificate(&format!("not a PEM file of certificates: {error}")))?;
    if chain.is_empty() {
        return Err(of_certificate("no certificate in it; a PEM file with BEGIN CERTIFICATE is expected"));
    }
    let pem = std::fs::read(key).map_err(|error| of_key(&error.to_string()))?;
    if is_encrypted(&pem) {
        return Err(of_key("the key is encrypted; write it without a password: openssl pkey -in key.pem -out plain.pem"));
    }
    let private = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| match key == certificate {
        true => of_key(&format!("no private key in it ({error}); set SSL_KEYFILE to the file that holds it")),
        false => of_key(&format!("no private key in it ({error}); a PEM file with BEGIN PRIVATE KEY is expected")),
    })?;
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| of_certificate(&error.to_string()))?.with_no_client_auth();
    let mut config = builder.with_single_cert(chain, private).map_err(|error| match error {
        Error::InconsistentKeys(_) => of_key(&format!("the key is not that of the certificate in {}", certificate.display())),
        Error::InvalidCertificate(error) => of_certificate(&format!("the certificate cannot be read: {error}")),
        other => of_key(&format!("the key cannot be used: {other}")),
    })?;
    // What the listener speaks: a client that wants HTTP/2 alone learns it in the handshake.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// In either way of writing so: PKCS #8's own heading, and the older headings with a line below.
fn is_encrypted(pem: &[u8]) -> bool {
    String::from_utf8_lossy(pem)
        .lines()
        .any(|line| line.starts_with("-----BEGIN ENCRYPTED PRIVATE KEY") || (line.starts_with("Proc-Type:") && line.contains("ENCRYPTED")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_told_with_its_setting_and_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let write = |name: &str, text: &str| std::fs::write(path(name), text).unwrap();
        write("empty", "");
        write("certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
        write("cut", "-----BEGIN CERTIFICATE-----\nAAAA\n");
        write("pkcs8", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n");
        write("old", "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES\n\nAAAA\n-----END RSA PRIVATE KEY-----\n");
        write("key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
        for (certificate, key, setting, words) in [
            ("none", Some("key"), "SSL_CERTFILE", "No such file"),
            ("empty", Some("key"), "SSL_CERTFILE", "no certificate"),
            ("cut", Some("key"), "SSL_CERTFILE", "not a PEM file"),
            ("certificate", Some("none"), "SSL_KEYFILE", "No such file"),
            ("certificate", Some("empty"), "SSL_KEYFILE", "no private key"),
            ("certificate", None, "SSL_CERTFILE", "set SSL_KEYFILE"),
            ("certificate", Some("pkcs8"), "SSL_KEYFILE", "encrypted"),
            ("certificate", Some("old"), "SSL_KEYFILE", "encrypted"),
            ("certificate", Some("key"), "SSL_KEYFILE", "cannot be used"),
        ] {
            let error = TlsFiles::read(path(certificate), key.map(path), false).unwrap_err();
            let file = if setting == "SSL_CERTFILE" { certificate } else { key.unwrap() };
            assert!(error.setting == setting && error.message.contains(words), "{certificate}, {key:?}: {error:?}");
            assert!(error.message.starts_with(&format!("{}: ", path(file).display())), "{error:?}");
        }
    }
}
