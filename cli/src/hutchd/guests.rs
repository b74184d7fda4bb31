//! What guests are answered at 169.254.169.254: each on its own tap, by the daemon's own threads.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use hutch_api::imds::{self, Document, Secret, Shared};
use hutch_cloud::host::local::{MetadataService, Served};
use hutch_cloud::metadata::Metadata;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

/// Where the secret is kept that signs guests' tokens, below the state.
const FILE: &str = "metadata.key";
/// How long a service may take to end.
const END: Duration = Duration::from_secs(5);

/// The metadata services of a host.
pub struct Guests {
    runtime: Handle,
    secret: [u8; 64],
}

impl Guests {
    /// Services that run on `runtime`. The tokens they gave stay good over restarts, by a secret that is kept in `state`.
    ///
    /// # Errors
    /// The secret can be neither read nor made.
    pub fn open(state: &Path, runtime: Handle) -> io::Result<Guests> {
        let path = state.join(FILE);
        let kept = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            kept => <[u8; 64]>::try_from(kept?).ok(),
        };
        let secret = match kept {
            Some(secret) => secret,
            None => {
                let mut secret = [0; 64];
                for part in secret.chunks_mut(16) {
                    part.copy_from_slice(uuid::Uuid::new_v4().as_bytes());
                }
                // Should this be cut short, it is made anew: guests ask for new tokens then.
                let mut file =
                    File::options().create(true).truncate(true).write(true).mode(0o600).open(&path)?;
                file.write_all(&secret)?;
                secret
            }
        };
        Ok(Guests { runtime, secret })
    }
}

/// A service that runs.
struct Running {
    document: Shared,
    task: AbortHandle,
    gone: Receiver<()>,
}

impl MetadataService for Guests {
    fn serve(&self, listener: TcpListener, metadata: &Metadata) -> io::Result<Box<dyn Served>> {
        let document: Shared = Arc::new(RwLock::new(Arc::new(Document::from(metadata))));
        let (alive, gone) = mpsc::channel::<()>();
        let (own, secret, id) = (document.clone(), Secret::from(self.secret), metadata.instance_id.clone());
        let task = self.runtime.spawn(async move {
            let _alive = alive;
            if let Err(error) = imds::serve(listener, own, secret).await {
                tracing::warn!(instance = id, %error, "the metadata service has ended");
            }
        });
        Ok(Box::new(Running { document, task: task.abort_handle(), gone }))
    }
}

impl Served for Running {
    fn update(&self, metadata: &Metadata) {
        *self.document.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Document::from(metadata));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
        // Until its port is free the next one could not have it. Nothing is ever sent.
        let _ = self.gone.recv_timeout(END);
    }
}
