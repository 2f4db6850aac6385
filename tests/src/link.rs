//! A link between two programs that can be cut as a cable is: nobody is told.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A TCP relay; it ends with the value.
pub struct Link {
    /// Where it is to be connected to.
    pub address: SocketAddr,
    /// Which cable it is: what went into one that was cut never comes out.
    cable: watch::Sender<Cable>,
    relay: JoinHandle<()>,
}

#[derive(Clone, Copy, PartialEq)]
struct Cable {
    number: u64,
    whole: bool,
}

impl Link {
    /// A link that leads to `to`. It has an address of loopback that nothing else listens on, so that
    /// daemons can be told to take no other way.
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

    /// Cuts it. Connections stay open, and nothing comes through any more.
    pub fn cut(&self) {
        self.cable.send_modify(|cable| cable.whole = false);
    }

    /// Puts another cable in its place: new connections come through, old ones never again.
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
        // Nobody is there to refuse it.
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
