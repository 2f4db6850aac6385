//! Owns the figures of the GPUs. Drivers of GPUs may hang, so a separate thread reads them, and callers wait for it
//! for a limited time only.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use serde::Serialize;

use super::gib;

/// The time limit of a measurement. After it the last figures are used.
const PATIENCE: Duration = Duration::from_secs(2);

/// The usage below which a GPU is available, in percent of its time and of its memory.
const IDLE: f64 = 10.0;

/// A GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gpu {
    /// The address on the PCI bus.
    pub pci: String,
    /// The vendor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor: Option<String>,
    /// The model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The free memory of the GPU in GiB, or `None` if the driver does not report it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_available: Option<f64>,
    /// The memory of the GPU, in GiB.
    pub memory_total: f64,
    /// The usage in percent, or `None` if the driver does not report it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<f64>,
}

impl Gpu {
    /// Returns whether the GPU appears to be unused, as far as its driver reports it.
    pub fn is_available(&self) -> bool {
        let used = self.memory_available.map_or(0.0, |free| 1.0 - free / self.memory_total) * 100.0;
        self.usage.unwrap_or(0.0) < IDLE && used < IDLE
    }

    /// Returns `None` for a device without known memory. The console of a server is no GPU for jobs.
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
    /// Starts the thread. It ends when this value is dropped or, if a driver hangs, with the process.
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
        // Without the thread no GPUs are reported, as on a machine without GPUs.
        if let Err(error) = std::thread::Builder::new().name("gpus".to_owned()).spawn(look) {
            tracing::warn!("the figures of the GPUs cannot be read: {error}");
        }
        Self { ask, answers, last: Vec::new() }
    }

    /// Returns the current figures, or the last ones after the time limit.
    pub fn look(&mut self) -> Vec<Gpu> {
        // A late answer to an earlier request.
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
