//! The limit of open files: raised as far as the system allows, since every connection is one.

/// More than this many is of no use, and some systems refuse more.
#[cfg(unix)]
const MOST: libc::rlim_t = 65_536;

/// Raises the limit of open files of this process as far as it may, and returns it; `None` where there is none, or it cannot be told.
#[cfg(unix)]
pub fn raise() -> Option<usize> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls only read or write the structure, which lives here.
    #[allow(unsafe_code)]
    let known = unsafe {
        let known = libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0;
        let wanted = limit.rlim_max.min(MOST);
        if known && limit.rlim_cur < wanted {
            let raised = libc::rlimit { rlim_cur: wanted, ..limit };
            if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) == 0 {
                limit = raised;
            }
        }
        known
    };
    (known && limit.rlim_cur != libc::RLIM_INFINITY).then(|| usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX))
}

#[cfg(not(unix))]
pub fn raise() -> Option<usize> {
    None
}

/// Open files that are not connections: the model's, logs, the runtime's own, room for another [`RESERVE`](crate::server::connections::RESERVE).
const OTHERS: usize = 64;

/// Connections that so many open files allow. The worker of `serve` calls its own process, where a connection is two files.
pub fn connections(open_files: usize) -> usize {
    (open_files.saturating_sub(OTHERS) / 2).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_room() {
        assert_eq!((connections(256), connections(1024), connections(10)), (96, 480, 1));
        let raised = raise();
        assert_eq!(raise(), raised, "once is enough");
    }
}
