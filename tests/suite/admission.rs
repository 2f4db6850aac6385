//! How many callers an API has at a time, and that none of them keeps the others out.

use std::io::Read as _;
use std::time::{Duration, Instant};

use dim_tests::{Setup, SupervisedHost, begin_request};
use serde_json::json;

/// What comes first of an answer.
fn status_of(mut stream: &std::os::unix::net::UnixStream) -> String {
    let mut head = [0; 12];
    stream.set_read_timeout(Some(Duration::from_secs(40))).unwrap();
    stream.read_exact(&mut head).unwrap();
    String::from_utf8_lossy(&head[9..]).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_never_come_and_answers_that_nobody_reads_let_others_have_their_turn() {
    let host = SupervisedHost::start(&Setup::probe()).await;
    let socket = host.serve_owner().await;
    let owner = reqwest::Client::builder().no_proxy().unix_socket(socket.as_path()).build().unwrap();
    let document =
        owner.put("http://dim/v1/keys/large/state").body(vec![b'x'; 16 << 20]).send().await.unwrap();
    assert_eq!(document.status(), 200);
    drop(owner);
    // All that there may be at a time.
    let kinds = [
        ("POST /v1/topics/talk/messages", 100),
        ("PUT /v1/plugins/other/component", 100),
        ("POST /v1/jobs/j/events", 100),
        ("GET /v1/names/large/state", 0),
    ];
    let stuck: Vec<_> =
        (kinds.iter().cycle().take(8)).map(|(line, length)| begin_request(&socket, line, *length)).collect();
    let asked = Instant::now();
    tokio::task::block_in_place(|| {
        let waiting = begin_request(&socket, "GET /v1/status", 0);
        for probe in ["/livez", "/readyz", "/healthz"] {
            assert_eq!(status_of(&begin_request(&socket, &format!("GET {probe}"), 0)), "200", "{probe}");
        }
        assert!(asked.elapsed() < Duration::from_secs(5), "health is told at once");
        assert_eq!(status_of(&waiting), "200", "it was its turn");
        assert_eq!(status_of(&stuck[0]), "408");
        assert_eq!(status_of(&stuck[1]), "408");
    });
    // Whoever reads nothing for 30 s is cut off in the midst of it.
    dim_tests::downtime(Duration::from_secs(32).saturating_sub(asked.elapsed())).await;
    tokio::task::block_in_place(|| {
        let mut answer = Vec::new();
        let read = (&stuck[3]).read_to_end(&mut answer);
        assert!(read.is_err() || answer.len() < 16 << 20, "{} bytes", answer.len());
    });
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn installing_and_removing_a_plugin_at_once_answers_as_described() {
    let host = SupervisedHost::start(&Setup::default()).await;
    let url = host.serve().await;
    let component = std::fs::read(dim_tests::FORGETFUL).unwrap();
    let other =
        dim_tests::component::with_manifest(&component, "name = \"forgetful\"\nversion = \"9.0.0\"\n");
    let plugin = format!("{url}/v1/plugins/forgetful");
    let client = dim_tests::with_token();
    let mut seen = Vec::new();
    for round in 0..30 {
        let component = if round % 2 == 0 { component.clone() } else { other.clone() };
        let install = client.put(format!("{plugin}/component?grant=true")).body(component).send();
        let remove = client.delete(&plugin).send();
        let again = client.delete(&plugin).send();
        let (installed, removed, again) = tokio::join!(install, remove, again);
        let installed = installed.unwrap();
        let status = installed.status().as_u16();
        let said = installed.text().await.unwrap();
        assert!([200, 409, 422].contains(&status), "{status}: {said}");
        seen.push(json!([status, said]));
        for removed in [removed, again] {
            let removed = removed.unwrap();
            let status = removed.status().as_u16();
            assert!([200, 404].contains(&status), "{status}: {}", removed.text().await.unwrap());
        }
    }
    assert!(seen.iter().any(|answer| answer[0] == 200), "{seen:?}");
    host.stop().await;
}
