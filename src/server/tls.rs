//! TLS on a listener. The certificate is read again when its files change, where the settings say so.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;

use super::watch::Watch;
use crate::config::TlsFiles;

/// Where connections come from: a socket, and what they speak below HTTP.
pub struct Listener {
    pub socket: TcpListener,
    /// `None` = plain HTTP.
    pub tls: Option<Arc<Tls>>,
}

impl From<TcpListener> for Listener {
    fn from(socket: TcpListener) -> Self {
        Self { socket, tls: None }
    }
}

/// The certificate in force.
pub struct Tls {
    files: TlsFiles,
    config: RwLock<Arc<ServerConfig>>,
    watch: Watch,
}

impl Tls {
    pub fn new(files: &TlsFiles) -> Self {
        let watch = Watch::new(vec![files.certificate.clone(), files.key_path().to_owned()], files.stamps.clone());
        Self { files: files.clone(), config: RwLock::new(files.config.clone()), watch }
    }

    /// The handshake of a connection, within `limit`.
    ///
    /// # Errors
    /// A client that speaks something else, does not trust the certificate, or takes too long.
    pub async fn accept(self: &Arc<Self>, stream: TcpStream, limit: Duration) -> io::Result<TlsStream<TcpStream>> {
        if self.files.refresh && self.watch.is_due() {
            let tls = self.clone();
            // Files may lie on a network.
            if let Err(error) = tokio::task::spawn_blocking(move || tls.look()).await {
                tracing::error!("the files of the certificate could not be looked at: {error}");
            }
        }
        let config = self.config.read().unwrap_or_else(PoisonError::into_inner).clone();
        tokio::time::timeout(limit, TlsAcceptor::from(config).accept(stream)).await?
    }

    /// Takes over files that have changed. What is wrong changes nothing, and is told once: of two files one is written first.
    fn look(&self) {
        if !self.watch.changed() {
            return;
        }
        match self.files.again() {
            Ok(config) => {
                *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
                tracing::info!("SSL_CERTFILE={}: the new certificate is in force", self.files.certificate.display());
            }
            Err(error) => tracing::error!("{}={}; the certificate of before stays in force", error.setting, error.message),
        }
    }
}
