//! Owns the number of plugin instances of an engine. The pool reserves address space for each. If the system
//! limits the address space of the process, as `ulimit -v` and batch systems do, the pool is smaller.

use dim_store::plugin_limits::MEMORY_BYTES;
use rustix::process::{Resource, getrlimit};
use wasmtime::PoolingAllocationConfig;

use crate::engine::EngineError;

/// Address space of one instance, in bytes: its memory, the guard pages after it, and its tables.
const SLOT: u64 = MEMORY_BYTES as u64 + GUARD + TABLES * TABLE_ELEMENTS as u64 * 8;

/// The guard pages that wasmtime reserves after each memory, in bytes.
const GUARD: u64 = 32 << 20;

/// Tables of each instance.
const TABLES: u64 = 4;

/// Elements of a table.
const TABLE_ELEMENTS: usize = 60_000;

/// Address space that remains for the rest of the process at least, in bytes: threads, caches, compiled code.
const REST: u64 = 2 << 30;

/// Fewest useful instances: the bundled plugins, and the replacement of one.
const LEAST: u64 = 4;

/// The use of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capacity {
    /// A host: at most 1,000 instances, including those of rehearsals.
    Host,
    /// The inspection and tests of a few components: at most 64 instances.
    Bench,
}

impl Capacity {
    const fn most(self) -> u64 {
        match self {
            Self::Host => 1_000,
            Self::Bench => 64,
        }
    }

    /// The configuration of the pool that fits into the remaining address space.
    pub fn pool(self) -> Result<PoolingAllocationConfig, EngineError> {
        let instances = match getrlimit(Resource::As).current {
            Some(limit) => self.within(limit, reserved())?,
            None => self.most(),
        };
        Ok(sized(u32::try_from(instances).expect("it is at most what fits best")))
    }

    /// The number of instances that fit if the process may reserve `limit` bytes and has reserved `used`.
    fn within(self, limit: u64, used: u64) -> Result<u64, EngineError> {
        let left = limit.saturating_sub(used);
        let fit = left.saturating_sub(REST.max(left / 4)) / SLOT;
        if fit < LEAST {
            let needed = used.saturating_add((LEAST * SLOT + REST).max((LEAST * SLOT).div_ceil(3) * 4));
            return Err(EngineError::AddressSpace { limit, needed });
        }
        if fit < self.most() {
            tracing::info!(
                limit,
                instances = fit,
                "the address space of the process is limited (ulimit -v): fewer instances of plugins fit"
            );
        }
        Ok(fit.min(self.most()))
    }
}

/// The configuration of a pool for a number of instances.
fn sized(instances: u32) -> PoolingAllocationConfig {
    let mut pool = PoolingAllocationConfig::new();
    // A component consists of many core instances: a Python component of about thirty.
    pool.total_component_instances(instances)
        .total_core_instances(instances.saturating_mul(4).max(100))
        .total_memories(instances)
        .total_tables(instances.saturating_mul(TABLES as u32).max(100))
        // Calls are synchronous and use the stacks of the threads.
        .total_stacks(1)
        .max_core_instances_per_component(100)
        .max_memories_per_component(4)
        .max_tables_per_component(100)
        .max_memory_size(MEMORY_BYTES)
        .table_elements(TABLE_ELEMENTS);
    pool
}

/// The address space that the process has reserved, in bytes.
fn reserved() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|sizes| sizes.split_whitespace().next()?.parse::<u64>().ok());
    // Other systems do not show it, so this is the typical value at a start.
    pages.map_or(1 << 30, |pages| pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_is_as_large_as_the_address_space_allows() {
        assert_eq!(Capacity::Host.within(u64::MAX, 0).unwrap(), 1_000);
        let fit = Capacity::Host.within(64 << 30, 1 << 30).unwrap();
        assert!((40..=48).contains(&fit), "{fit}");
        assert!(Capacity::Bench.within(8 << 30, 0).unwrap() >= LEAST);
        let error = Capacity::Host.within(4 << 30, 0).unwrap_err();
        let EngineError::AddressSpace { limit, needed } = &error else { panic!("{error}") };
        assert_eq!(*limit, 4 << 30);
        assert!(Capacity::Host.within(*needed, 0).is_ok(), "{needed} bytes are enough");
        assert!(error.to_string().contains("ulimit -v"), "{error}");
    }
}
