//! What this process may use of the machine: its memory and its processors.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

use super::Memory;
use crate::config::EngineSettings;

/// Main memory, as far as this process may use it: the control groups' limits where there are any.
pub fn host_memory() -> Memory {
    let fallback = Memory { gpu: false, total: 8 << 30, free: 4 << 30 };
    let Some(machine) = read_to_string("/proc/meminfo").ok().and_then(|text| meminfo(&text)) else { return fallback };
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    group_folders(&groups).filter_map(|(version, folder)| group_memory(version, &folder)).fold(machine, within)
}

/// `/proc/meminfo`'s view of the whole machine.
fn meminfo(text: &str) -> Option<Memory> {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<usize>().ok()?.checked_mul(1 << 10)
    };
    Some(Memory { gpu: false, total: field("MemTotal:")?, free: field("MemAvailable:")? })
}

/// The narrower of the two, figure by figure.
fn within(memory: Memory, (limit, free): (usize, usize)) -> Memory {
    let total = memory.total.min(limit);
    Memory { total, free: memory.free.min(free).min(total), ..memory }
}

/// The kernel's two interfaces to control groups, which name things differently.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Version {
    V1,
    V2,
}

/// Every folder whose memory limit binds this process: its group's and those above it, up to the root of what is mounted.
///
/// In a container the root is the container's own group, and the path that `/proc/self/cgroup` gives may be the host's: folders that are
/// not there are skipped when they are read.
fn group_folders(self_cgroup: &str) -> impl Iterator<Item = (Version, PathBuf)> {
    let groups = self_cgroup.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        // `..`: a group outside of this namespace, which cannot be seen from here.
        let path = if path.split('/').any(|part| part == "..") { "/" } else { path };
        match controllers {
            "" => Some((Version::V2, "/sys/fs/cgroup", path)),
            names if names.split(',').any(|name| name == "memory") => Some((Version::V1, "/sys/fs/cgroup/memory", path)),
            _ => None,
        }
    });
    groups.flat_map(|(version, mount, path)| {
        let below = move |above: &Path| Path::new(mount).join(above.strip_prefix("/").unwrap_or(above));
        Path::new(path).ancestors().map(move |above| (version, below(above)))
    })
}

/// Limit and free bytes of one group, where it has a limit.
fn group_memory(version: Version, folder: &Path) -> Option<(usize, usize)> {
    let [limit, usage] = match version {
        Version::V1 => ["memory.limit_in_bytes", "memory.usage_in_bytes"],
        Version::V2 => ["memory.max", "memory.current"],
    };
    let read = |name: &str| read_to_string(folder.join(name)).unwrap_or_default();
    let limit = read(limit);
    // Nearly always there is none.
    number(&limit)?;
    limited(version, &limit, &read(usage), &read("memory.stat"))
}

/// Limit and free bytes by the contents of a group's files. `max` is no limit.
///
/// The page cache is charged to the group that read a file, and given up when memory runs short: a model that was just downloaded or
/// mapped is not in the way. (What lies in tmpfs cannot be given up; it counts as anonymous memory there.)
fn limited(version: Version, limit: &str, usage: &str, stat: &str) -> Option<(usize, usize)> {
    let limit = number(limit)?;
    let field = |name: &str| {
        let values = stat.lines().filter_map(|line| line.split_once(' '));
        values.filter(|(key, _)| *key == name).find_map(|(_, value)| number(value)).unwrap_or(0)
    };
    let files = match version {
        Version::V1 => ["total_inactive_file", "total_active_file"],
        Version::V2 => ["inactive_file", "active_file"],
    };
    let reclaimable = files.into_iter().map(field).fold(0, usize::saturating_add);
    let used = number(usage).unwrap_or(0).saturating_sub(reclaimable);
    Some((limit, limit.saturating_sub(used)))
}

fn number(text: &str) -> Option<usize> {
    text.trim().parse().ok()
}

/// Threads for computing: the setting, else the processors this process may use (the control group's quota counted in).
pub fn threads(settings: &EngineSettings) -> usize {
    settings.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

/// The most memory this process ever had resident, in MiB, where the system tells.
pub fn peak_rss_mb() -> Option<f64> {
    let status = read_to_string("/proc/self/status").ok()?;
    let kib: f64 = status.lines().find(|line| line.starts_with("VmHWM:"))?.split_whitespace().nth(1)?.parse().ok()?;
    Some((kib / 1024.0 * 10.0).round() / 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: usize = 1 << 30;

    #[test]
    fn the_machine_says_what_is_available() {
        let text = "MemTotal:       24689764 kB\nMemFree:          812344 kB\nMemAvailable:   22023060 kB\nBuffers:          1 kB\n";
        assert_eq!(meminfo(text), Some(Memory { gpu: false, total: 24_689_764 << 10, free: 22_023_060 << 10 }));
        assert_eq!(meminfo("MemTotal: 24689764 kB\n"), None, "a kernel before 3.14");
        assert_eq!(meminfo("MemTotal: many kB\nMemAvailable: 1 kB\n"), None);
    }

    #[test]
    fn this_machine_has_memory() {
        let memory = host_memory();
        assert!(memory.free <= memory.total && memory.total > 1 << 28, "{memory:?}");
    }

    #[test]
    fn groups_bind_up_to_the_root() {
        let folders = |text: &str| group_folders(text).map(|(version, path)| (version, path.display().to_string())).collect::<Vec<_>>();
        let v2 = |path: &str| (Version::V2, path.to_owned());
        let v1 = |path: &str| (Version::V1, path.to_owned());
        assert_eq!(folders("0::/\n"), [v2("/sys/fs/cgroup/")]);
        assert_eq!(
            folders("0::/system.slice/worker.service\n"),
            [v2("/sys/fs/cgroup/system.slice/worker.service"), v2("/sys/fs/cgroup/system.slice"), v2("/sys/fs/cgroup/")]
        );
        let hybrid = "5:devices:/\n4:cpuset,memory:/docker/0f8b\n1:name=systemd:/x:y\n0::/\n";
        assert_eq!(
            folders(hybrid),
            [
                v1("/sys/fs/cgroup/memory/docker/0f8b"),
                v1("/sys/fs/cgroup/memory/docker"),
                v1("/sys/fs/cgroup/memory/"),
                v2("/sys/fs/cgroup/")
            ]
        );
        assert_eq!(folders("0::/../other\n"), [v2("/sys/fs/cgroup/")]);
        assert!(folders("").is_empty() && folders("nonsense\n3:cpu\n").is_empty());
    }

    #[test]
    fn page_cache_is_not_in_the_way() {
        // 6 GiB in use, of which 5 are the files of a model that was just downloaded.
        let stat = "anon 1073741824\nfile 5368709120\nshmem 0\nfile_dirty 4096\ninactive_anon 1073741824\nactive_anon 0\n\
            inactive_file 4294967296\nactive_file 1073741824\nunevictable 0\n";
        let current = (6 * GIB).to_string();
        assert_eq!(limited(Version::V2, "8589934592\n", &current, stat), Some((8 * GIB, 7 * GIB)));
        // Anonymous memory and tmpfs stay in the way.
        let anonymous = "anon 6442450944\nshmem 1073741824\ninactive_anon 1073741824\ninactive_file 0\nactive_file 0\n";
        assert_eq!(limited(Version::V2, "8589934592", &current, anonymous), Some((8 * GIB, 2 * GIB)));
        // Version 1 counts a group's own pages and, by another name, those of the groups below as well, which its usage includes.
        let v1 = "cache 4096\ninactive_file 4096\nactive_file 0\nhierarchical_memory_limit 8589934592\ntotal_cache 5368709120\n\
            total_inactive_file 4294967296\ntotal_active_file 1073741824\n";
        assert_eq!(limited(Version::V1, "8589934592\n", &current, v1), Some((8 * GIB, 7 * GIB)));
        // No file of statistics, no usage: the limit alone is known.
        assert_eq!(limited(Version::V2, "8589934592", &current, ""), Some((8 * GIB, 2 * GIB)));
        assert_eq!(limited(Version::V2, "8589934592", "", ""), Some((8 * GIB, 8 * GIB)));
        // More in use than allowed (the limit was lowered), more cache than usage (they are not read at one moment).
        assert_eq!(limited(Version::V2, "1073741824", &current, ""), Some((GIB, 0)));
        assert_eq!(limited(Version::V2, "8589934592", "4096", stat), Some((8 * GIB, 8 * GIB)));
        assert_eq!(limited(Version::V2, "max\n", &current, stat), None);
        assert_eq!(limited(Version::V2, "", &current, stat), None);
    }

    #[test]
    fn the_narrowest_group_counts() {
        let machine = Memory { gpu: false, total: 16 * GIB, free: 12 * GIB };
        // Version 1's way to say that there is no limit.
        let (limit, free) = limited(Version::V1, "9223372036854771712", "4096", "").unwrap();
        assert_eq!(within(machine, (limit, free)), machine);
        let outer = within(machine, (8 * GIB, 2 * GIB));
        assert_eq!(outer, Memory { gpu: false, total: 8 * GIB, free: 2 * GIB });
        assert_eq!(within(outer, (4 * GIB, 3 * GIB)), Memory { gpu: false, total: 4 * GIB, free: 2 * GIB });
        // A limit with much free in it does not make memory.
        assert_eq!(within(Memory { free: GIB, ..machine }, (8 * GIB, 8 * GIB)).free, GIB);
    }

    #[test]
    fn a_group_is_read_from_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        assert_eq!(group_memory(Version::V2, folder.path()), None);
        write("memory.max", "1073741824\n");
        write("memory.current", "536870912\n");
        write("memory.stat", "inactive_file 268435456\n");
        assert_eq!(group_memory(Version::V2, folder.path()), Some((GIB, GIB * 3 / 4)));
        assert_eq!(group_memory(Version::V1, folder.path()), None);
    }
}
