//! An S3 server on loopback, for tests: `hutch-s3 DIR BUCKET KEY SECRET HOLD`.
//!
//! It keeps BUCKET in DIR, takes requests that KEY and SECRET sign, and prints its address. While there is a file HOLD, what
//! writes waits.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use hyper::Method;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;
use tokio::net::TcpListener;

fn main() -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(serve())
}

async fn serve() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut next = |what| args.next().with_context(|| format!("{what} is missing"));
    let (dir, bucket, key, secret) =
        (PathBuf::from(next("DIR")?), next("BUCKET")?, next("KEY")?, next("SECRET")?);
    let hold = PathBuf::from(next("HOLD")?);
    std::fs::create_dir_all(dir.join(bucket))?;
    let files = FileSystem::new(dir).map_err(|e| anyhow::anyhow!("the directory: {e:?}"))?;
    let mut builder = S3ServiceBuilder::new(files);
    builder.set_auth(SimpleAuth::from_single(key, secret));
    let s3 = builder.build();
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    println!("http://{}", listener.local_addr()?);
    loop {
        let (socket, _) = listener.accept().await?;
        let (s3, hold) = (s3.clone(), hold.clone());
        let serve = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            let (s3, hold) = (s3.clone(), hold.clone());
            async move {
                while matches!(*request.method(), Method::PUT | Method::POST) && hold.exists() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Service::call(&s3, request).await
            }
        });
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(socket), serve));
    }
}
