//! Runs real Kubo daemons on loopback, each with its own repository. Finds or builds the program.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::child::Owned;

/// A running daemon, which is killed on drop.
pub struct Kubo {
    // Must be dropped before the repository; fields are dropped in this order.
    daemon: Owned,
    repo: TempDir,
    api: String,
    options: &'static [&'static str],
    dnslink: String,
}

/// The addresses of all test daemons.
const LOOPBACK: &str = "/ip4/127.0.0.0/ipcidr/8";

impl Kubo {
    /// Starts a daemon. Returns none if `DIM_SKIP_KUBO=1`; otherwise panics without Kubo.
    pub fn start() -> Option<Self> {
        Self::start_with(|_| None, &[], "")
    }

    /// Starts a daemon with DNSLink records for some domains, for example `fleet.example.org:/ipfs/CID`.
    pub fn start_with_dnslink(records: &str) -> Option<Self> {
        Self::start_with(|_| None, &[], records)
    }

    /// Starts a daemon without a network and without pubsub.
    pub fn start_offline() -> Option<Self> {
        Self::start_with(|_| None, &["--offline"], "")
    }

    /// Starts a daemon whose API is on a Unix socket.
    pub fn start_on_a_socket() -> Option<Self> {
        Self::start_with(|repo| Some(format!("/unix{}/api.sock", repo.display())), &[], "")
    }

    fn start_with(
        api: impl FnOnce(&Path) -> Option<String>,
        options: &'static [&'static str],
        dnslink: &str,
    ) -> Option<Self> {
        let program = program()?;
        let repo = tempfile::tempdir().expect("a temporary directory");
        let address = api(repo.path());
        init(program, repo.path(), address.as_deref());
        let (daemon, api) = spawn(program, &repo, options, dnslink);
        Some(Self { repo, daemon, api, options, dnslink: dnslink.to_owned() })
    }

    /// Replaces the daemon by one with an empty repository at the same address, like a container without a volume.
    pub fn replace_by_an_empty_one(&mut self) {
        self.kill();
        let program = program().expect("it has started");
        self.repo = tempfile::tempdir().expect("a temporary directory");
        init(program, self.repo.path(), Some(&self.api));
        self.respawn(program);
    }

    /// Starts two connected daemons.
    pub fn start_pair() -> Option<(Self, Self)> {
        let (one, other) = (Self::start()?, Self::start()?);
        let addresses = other.ipfs(&["id", "-f", "<addrs>"]);
        one.ipfs(&["swarm", "connect", addresses.lines().next().expect("an address")]);
        Some((one, other))
    }

    /// Returns the multiaddr of the API.
    pub fn api(&self) -> &str {
        &self.api
    }

    /// Returns the URL of the API.
    pub fn url(&self) -> String {
        let port = self.api.rsplit('/').next().expect("a port");
        format!("http://127.0.0.1:{port}")
    }

    /// Runs `ipfs` against the daemon. Returns the output; panics on an error.
    pub fn ipfs(&self, args: &[&str]) -> String {
        run(program().expect("it has started"), self.repo.path(), args)
    }

    /// Runs `ipfs` against the daemon. Returns the output or the error.
    pub fn try_ipfs(&self, args: &[&str]) -> Result<String, String> {
        try_run(program().expect("it has started"), self.repo.path(), args)
    }

    /// Disconnects the daemon from all peers and blocks new connections. The API stays available.
    pub fn cut_off(&self) {
        self.ipfs(&["swarm", "filters", "add", LOOPBACK]);
        for peer in self.ipfs(&["swarm", "peers"]).lines() {
            // The error means that the peer has already disconnected.
            let _ = self.try_ipfs(&["swarm", "disconnect", peer]);
        }
    }

    /// Returns whether the daemon has a peer.
    pub fn has_peers(&self) -> bool {
        !self.ipfs(&["swarm", "peers"]).is_empty()
    }

    /// Unblocks connections and connects the daemon to `other`.
    pub fn reconnect(&self, other: &Self) {
        self.ipfs(&["swarm", "filters", "rm", LOOPBACK]);
        let addresses = other.ipfs(&["id", "-f", "<addrs>"]);
        let address = addresses.lines().next().expect("an address");
        let deadline = Instant::now() + Duration::from_secs(20);
        // libp2p delays a dial after a failed one, so the connection is retried.
        while let Err(error) = self.try_ipfs(&["swarm", "connect", address]) {
            assert!(Instant::now() < deadline, "the daemons do not connect again: {error}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Returns the URL of the gateway, as in `http://127.0.0.1:8080`.
    pub fn gateway(&self) -> String {
        let gateway = std::fs::read_to_string(self.repo.path().join("gateway"));
        gateway.expect("the daemon has a gateway").trim().to_owned()
    }

    /// Returns the path of the repository.
    pub fn repo(&self) -> &Path {
        self.repo.path()
    }

    /// Suspends the daemon. Its sockets stay open.
    pub fn freeze(&self) {
        self.daemon.freeze();
    }

    /// Resumes the suspended daemon.
    pub fn thaw(&self) {
        self.daemon.thaw();
    }

    /// Kills the daemon. The repository stays.
    pub fn kill(&mut self) {
        self.daemon.kill();
        let _ = std::fs::remove_file(self.repo.path().join("api"));
    }

    /// Starts the killed daemon again, on the same port.
    pub fn restart(&mut self) {
        let program = program().expect("it has started");
        run(program, self.repo.path(), &["config", "Addresses.API", &self.api]);
        self.respawn(program);
    }

    fn respawn(&mut self, program: &Path) {
        let (daemon, api) = spawn(program, &self.repo, self.options, &self.dnslink);
        assert_eq!(api, self.api, "the daemon is where it was");
        self.daemon = daemon;
    }
}

/// Creates a repository. `api` is the multiaddr of its API, if given.
fn init(program: &Path, repo: &Path, api: Option<&str>) {
    let run = |args: &[&str]| run(program, repo, args);
    run(&["init", "--profile=test"]);
    run(&["config", "--json", "Pubsub.Enabled", "true"]);
    run(&["config", "--json", "Ipns.UsePubsub", "true"]);
    run(&["config", "--json", "Provide.Enabled", "false"]);
    if let Some(api) = api {
        run(&["config", "Addresses.API", api]);
    }
}

fn spawn(program: &Path, repo: &TempDir, options: &[&str], dnslink: &str) -> (Owned, String) {
    let log = std::fs::File::create(repo.path().join("daemon.log")).expect("a log file");
    let mut command = Command::new(program);
    command.arg("daemon").args(options).env("IPFS_PATH", repo.path()).stdin(Stdio::null());
    if !dnslink.is_empty() {
        command.env("IPFS_NS_MAP", dnslink);
    }
    let daemon = Owned::spawn(command.stdout(log.try_clone().expect("a log file")).stderr(log));
    let deadline = Instant::now() + Duration::from_secs(60);
    // The daemon writes the file with its address when its listener is ready.
    loop {
        let api = std::fs::read_to_string(repo.path().join("api")).unwrap_or_default();
        if !api.trim().is_empty() && try_run(program, repo.path(), &["id"]).is_ok() {
            return (daemon, api.trim().to_owned());
        }
        let log = || std::fs::read_to_string(repo.path().join("daemon.log")).unwrap_or_default();
        assert!(Instant::now() < deadline, "the daemon does not start: {}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn run(program: &Path, repo: &Path, args: &[&str]) -> String {
    try_run(program, repo, args).unwrap_or_else(|error| panic!("ipfs {}: {error}", args.join(" ")))
}

fn try_run(program: &Path, repo: &Path, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).env("IPFS_PATH", repo).output().expect("ipfs can be run");
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

/// Returns the program: `DIM_KUBO`, else `ipfs` on the path, else a build with Go. Returns none if `DIM_SKIP_KUBO=1`
/// skips the tests with Kubo; otherwise panics without Kubo.
fn program() -> Option<&'static Path> {
    static PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match PROGRAM.get_or_init(find) {
        Ok(program) => Some(program),
        Err(why) if std::env::var("DIM_SKIP_KUBO").is_ok_and(|skip| skip == "1") => {
            crate::say(&format!("\n!!! A KUBO TEST IS SKIPPED: {why}\n"));
            None
        }
        Err(why) => panic!("this test needs Kubo (set DIM_SKIP_KUBO=1 to go without): {why}"),
    }
}

fn find() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("DIM_KUBO") {
        return Ok(path.into());
    }
    let on_path = Command::new("ipfs").arg("version").output();
    if on_path.is_ok_and(|output| output.status.success()) {
        return Ok("ipfs".into());
    }
    build()
}

fn build() -> Result<PathBuf, String> {
    let module = crate::data("kubo");
    let program =
        Path::new(crate::PROBE).ancestors().nth(4).expect("the target directory").join("kubo").join("ipfs");
    if program.exists() {
        return Ok(program);
    }
    crate::say("building Kubo with Go, as tests/kubo/go.mod pins it; this takes some minutes once");
    let half = program.with_extension("half");
    let built = Command::new("go")
        .args(["build", "-o"])
        .arg(&half)
        .arg("github.com/ipfs/kubo/cmd/ipfs")
        .current_dir(module)
        .status()
        .map_err(|error| format!("no DIM_KUBO, no `ipfs` on the path, and Go cannot be run: {error}"))?;
    if !built.success() {
        return Err("Kubo does not build".to_owned());
    }
    std::fs::rename(&half, &program).map_err(|error| error.to_string())?;
    Ok(program)
}
