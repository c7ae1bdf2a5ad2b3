//! A store in memory: the reference for all other stores, and the base of tests.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use sprat_store::{
    Access, Capabilities, FileName, FileStat, FreeSpace, IgnorePoison, ReadClass, Store,
    StoreError, StoreFile,
};

/// A folder in memory; clones share the contents.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    files: Arc<Mutex<BTreeMap<FileName, Arc<MemoryFile>>>>,
    /// By how much this store's clock is ahead of the system's, in seconds.
    ahead_s: Arc<AtomicU64>,
}

#[derive(Debug)]
struct MemoryFile {
    name: String,
    bytes: Mutex<Vec<u8>>,
    modified_s: AtomicU64,
    ahead_s: Arc<AtomicU64>,
}

/// A handle on a [`MemoryFile`] with the access it was opened for.
struct MemoryHandle {
    file: Arc<MemoryFile>,
    access: Access,
}

impl MemoryStore {
    /// Creates an empty folder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Moves this store's clock ahead, for the times of files that are changed from now on.
    pub fn let_pass(&self, seconds: u64) {
        self.ahead_s.fetch_add(seconds, Ordering::SeqCst);
    }

    fn find(&self, op: &'static str, name: &FileName) -> Result<Arc<MemoryFile>, StoreError> {
        self.files
            .lock()
            .ignore_poison()
            .get(name)
            .cloned()
            .ok_or_else(|| StoreError::NotFound {
                op,
                object: name.to_string(),
            })
    }
}

impl Store for MemoryStore {
    fn describe(&self) -> String {
        "memory".to_owned()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            durable_flush: true,
            discard: true,
            free_space: true,
            atomic_replace: true,
        }
    }

    fn open(&self, name: &FileName, access: Access) -> Result<Arc<dyn StoreFile>, StoreError> {
        let file = self.find("open", name)?;
        Ok(Arc::new(MemoryHandle { file, access }))
    }

    fn create_new(&self, name: &FileName) -> Result<Arc<dyn StoreFile>, StoreError> {
        let mut files = self.files.lock().ignore_poison();
        if files.contains_key(name) {
            return Err(StoreError::AlreadyExists {
                op: "create",
                object: name.to_string(),
            });
        }
        let file = Arc::new(MemoryFile {
            name: name.to_string(),
            bytes: Mutex::default(),
            modified_s: AtomicU64::new(0),
            ahead_s: Arc::clone(&self.ahead_s),
        });
        file.touch();
        files.insert(name.clone(), Arc::clone(&file));
        Ok(Arc::new(MemoryHandle {
            file,
            access: Access::ReadWrite,
        }))
    }

    fn stat(&self, name: &FileName) -> Result<FileStat, StoreError> {
        Ok(self.find("stat", name)?.stat())
    }

    fn rename(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        let mut files = self.files.lock().ignore_poison();
        let file = files.remove(from).ok_or_else(|| StoreError::NotFound {
            op: "rename",
            object: from.to_string(),
        })?;
        files.insert(to.clone(), file);
        Ok(())
    }

    fn rename_new(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        let mut files = self.files.lock().ignore_poison();
        if !files.contains_key(from) {
            return Err(StoreError::NotFound {
                op: "rename",
                object: from.to_string(),
            });
        }
        if files.contains_key(to) {
            return Err(StoreError::AlreadyExists {
                op: "rename",
                object: to.to_string(),
            });
        }
        let file = files.remove(from);
        files.extend(file.map(|file| (to.clone(), file)));
        Ok(())
    }

    fn remove(&self, name: &FileName) -> Result<(), StoreError> {
        match self.files.lock().ignore_poison().remove(name) {
            Some(_) => Ok(()),
            None => Err(StoreError::NotFound {
                op: "remove",
                object: name.to_string(),
            }),
        }
    }

    fn list(&self) -> Result<Vec<FileName>, StoreError> {
        Ok(self.files.lock().ignore_poison().keys().cloned().collect())
    }

    fn flush_folder(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn free_space(&self) -> Result<FreeSpace, StoreError> {
        Ok(FreeSpace {
            available_bytes: 1 << 50,
            total_bytes: 1 << 50,
            read_only: false,
        })
    }
}

impl MemoryFile {
    fn touch(&self) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.map_or(0, |now| now.as_secs());
        let ahead = self.ahead_s.load(Ordering::SeqCst);
        self.modified_s.store(now + ahead, Ordering::SeqCst);
    }

    fn stat(&self) -> FileStat {
        let len = self.bytes.lock().ignore_poison().len() as u64;
        FileStat {
            len,
            modified_s: Some(self.modified_s.load(Ordering::SeqCst)),
            regular: true,
            allocated_bytes: Some(len),
        }
    }
}

impl MemoryHandle {
    fn writable(&self, op: &'static str) -> Result<(), StoreError> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(StoreError::PermissionDenied {
                op,
                object: self.file.name.clone(),
            }),
        }
    }

    /// Returns the range as indices; an error if no memory can hold it.
    fn indices(
        &self,
        op: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<std::ops::Range<usize>, StoreError> {
        let end = offset
            .checked_add(len)
            .and_then(|end| usize::try_from(end).ok());
        match (usize::try_from(offset), end) {
            (Ok(start), Some(end)) if end < 1 << 40 => Ok(start..end),
            _ => Err(StoreError::NoSpace {
                op,
                object: self.file.name.clone(),
                available_bytes: 1 << 40,
            }),
        }
    }
}

impl StoreFile for MemoryHandle {
    fn len(&self) -> Result<u64, StoreError> {
        Ok(self.file.stat().len)
    }

    fn stat(&self) -> Result<FileStat, StoreError> {
        Ok(self.file.stat())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], _class: ReadClass) -> Result<(), StoreError> {
        let bytes = self.file.bytes.lock().ignore_poison();
        let start = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let found = &bytes[start..];
        if found.len() < buf.len() {
            return Err(StoreError::Truncated {
                op: "read",
                object: self.file.name.clone(),
                offset,
                asked: buf.len() as u64,
                got: found.len() as u64,
            });
        }
        buf.copy_from_slice(&found[..buf.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        self.writable("write")?;
        if data.is_empty() {
            return Ok(());
        }
        let range = self.indices("write", offset, data.len() as u64)?;
        let mut bytes = self.file.bytes.lock().ignore_poison();
        if bytes.len() < range.end {
            bytes.resize(range.end, 0);
        }
        bytes[range].copy_from_slice(data);
        self.file.touch();
        Ok(())
    }

    fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.writable("discard")?;
        let mut bytes = self.file.bytes.lock().ignore_poison();
        let end = offset.saturating_add(len).min(bytes.len() as u64);
        let range = self.indices("discard", offset.min(end), end - offset.min(end))?;
        bytes[range].fill(0);
        Ok(())
    }

    fn resize(&self, len: u64) -> Result<(), StoreError> {
        self.writable("resize")?;
        let end = self.indices("resize", len, 0)?.end;
        self.file.bytes.lock().ignore_poison().resize(end, 0);
        Ok(())
    }
}
