//! Connections: each is served by a task of its own, which no other waits for.

use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Longest wait for the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// Wait after a connection could not be accepted, as when the process has too many files.
const RETRY: Duration = Duration::from_millis(50);

/// Accepts connections until `ending` says so. Those that are open then end with the request that they serve.
pub(crate) async fn accept(listener: TcpListener, router: Router, mut ending: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    tokio::spawn(serve(stream, router.clone(), ending.clone()));
                }
                Err(_) => tokio::time::sleep(RETRY).await,
            },
            () = ended(&mut ending) => return,
        }
    }
}

async fn serve(stream: TcpStream, router: Router, mut ending: watch::Receiver<bool>) {
    // Tokens are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    let service = TowerToHyperService::new(router);
    let mut builder = http1::Builder::new();
    let connection = builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        // What a client breaks concerns that client only.
        _ = connection.as_mut() => return,
        () = ended(&mut ending) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

/// Waits until the server ends.
async fn ended(ending: &mut watch::Receiver<bool>) {
    // A sender that is gone ends it too.
    let _ = ending.wait_for(|ends| *ends).await;
}
