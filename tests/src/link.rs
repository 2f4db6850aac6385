//! A link between two programs that can fail silently, like a cut cable.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A TCP relay, which ends on drop.
pub struct Link {
    /// The address of the relay.
    pub address: SocketAddr,
    /// The current cable. Data on a cut cable is lost.
    cable: watch::Sender<Cable>,
    relay: JoinHandle<()>,
}

#[derive(Clone, Copy, PartialEq)]
struct Cable {
    number: u64,
    whole: bool,
}

impl Link {
    /// Starts a relay to `to`. Its loopback address is used by nothing else, so that a test can restrict daemons to the
    /// link.
    pub async fn to(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.2:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (cable, current) = watch::channel(Cable { number: 0, whole: true });
        let relay = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(relay(near, to, current.clone()));
            }
        });
        Self { address, cable, relay }
    }

    /// Cuts the link. Connections stay open, but no data passes.
    pub fn cut(&self) {
        self.cable.send_modify(|cable| cable.whole = false);
    }

    /// Repairs the link for new connections. Old connections stay silent.
    pub fn mend(&self) {
        self.cable.send_modify(|cable| *cable = Cable { number: cable.number + 1, whole: true });
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.relay.abort();
    }
}

async fn relay(near: TcpStream, to: SocketAddr, cable: watch::Receiver<Cable>) {
    let mine = *cable.borrow();
    if !mine.whole {
        // On a cut link nothing refuses the connection.
        return std::future::pending().await;
    }
    let Ok(far) = TcpStream::connect(to).await else { return };
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    tokio::join!(carry(near_in, far_out, mine, cable.clone()), carry(far_in, near_out, mine, cable.clone()));
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mine: Cable, cable: watch::Receiver<Cable>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length) = from.read(&mut buffer).await {
        if *cable.borrow() != mine {
            return std::future::pending().await;
        }
        if length == 0 || to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
