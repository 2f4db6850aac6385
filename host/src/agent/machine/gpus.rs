//! Owns the look at the GPUs. It goes through the libraries of their drivers, which may hang: so they
//! are looked at on a thread of their own, that nobody waits for longer than a moment.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use serde::Serialize;

use super::gib;

/// How long a look may take before the last one has to do.
const PATIENCE: Duration = Duration::from_secs(2);

/// A GPU is available if it is used for less than this, in percent, of its time and of its memory.
const IDLE: f64 = 10.0;

/// A GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gpu {
    /// Where it is on the bus.
    pub pci: String,
    /// Who made it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor: Option<String>,
    /// Which it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// GiB of its own memory that are free; none if the driver does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_available: Option<f64>,
    /// GiB of its own memory.
    pub memory_total: f64,
    /// How busy it is, in percent; none if the driver does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<f64>,
}

impl Gpu {
    /// Whether nobody seems to use it, as far as its driver says.
    pub fn is_available(&self) -> bool {
        let used = self.memory_available.map_or(0.0, |free| 1.0 - free / self.memory_total) * 100.0;
        self.usage.unwrap_or(0.0) < IDLE && used < IDLE
    }

    /// None for what has no memory to be seen: the console of a server is no GPU to a job.
    fn of(gpu: &sysinfo::Gpu) -> Option<Self> {
        let total = gpu.total_memory().filter(|total| *total > 0)?;
        Some(Self {
            pci: gpu.pci().to_string(),
            vendor: gpu.vendor().map(str::to_owned),
            model: gpu.model().map(str::to_owned),
            memory_available: gpu.used_memory().map(|used| gib(total.saturating_sub(used))),
            memory_total: gib(total).max(0.01),
            usage: gpu.usage().map(|usage| f64::from(usage).round()),
        })
    }
}

/// The GPUs of this machine.
#[derive(Debug)]
pub struct Gpus {
    ask: SyncSender<()>,
    answers: Receiver<Vec<Gpu>>,
    last: Vec<Gpu>,
}

impl Gpus {
    /// Starts the thread. It ends with this, or, in a driver that hangs, with the process.
    pub fn start() -> Self {
        let (ask, asked) = sync_channel(1);
        let (answer, answers) = sync_channel(2);
        let look = move || {
            let Ok(mut gpus) = sysinfo::Gpus::new() else { return };
            while asked.recv().is_ok() {
                gpus.refresh(true);
                let seen = gpus.iter().filter_map(Gpu::of).collect();
                if answer.send(seen).is_err() {
                    return;
                }
            }
        };
        // Without the thread there are no GPUs to be seen, as on a machine without any.
        if let Err(error) = std::thread::Builder::new().name("gpus".to_owned()).spawn(look) {
            tracing::warn!("GPUs cannot be looked at: {error}");
        }
        Self { ask, answers, last: Vec::new() }
    }

    /// What is seen, or what was seen last.
    pub fn look(&mut self) -> Vec<Gpu> {
        // One that was asked for and came late.
        self.last = self.answers.try_iter().last().unwrap_or_else(|| std::mem::take(&mut self.last));
        let asked = self.ask.try_send(()).is_ok();
        if let Some(seen) = asked.then(|| self.answers.recv_timeout(PATIENCE).ok()).flatten() {
            self.last = seen;
        }
        self.last.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(memory_available: Option<f64>, usage: Option<f64>) -> Gpu {
        let pci = "0000:01:00.0".to_owned();
        Gpu { pci, vendor: None, model: None, memory_available, memory_total: 24.0, usage }
    }

    #[test]
    fn a_gpu_is_available_when_neither_its_time_nor_its_memory_is_used() {
        assert!(gpu(Some(23.5), Some(0.0)).is_available());
        assert!(gpu(None, None).is_available());
        assert!(!gpu(Some(23.5), Some(97.0)).is_available());
        assert!(!gpu(Some(2.0), Some(0.0)).is_available());
    }
}
