//! What a run's warnings mean for its snapshot, and why files are missing from it.

use crate::record::{RunRecord, Warning};

impl Warning {
    /// Whether the snapshot has less than its owner may think.
    #[must_use]
    pub fn lacks_something(&self) -> bool {
        use Warning as W;
        matches!(
            self,
            W::UnmountedMeanwhile { .. }
                | W::MountedMeanwhile { .. }
                | W::NotMounted { .. }
                | W::OtherFileSystem { .. }
                | W::AutomountEmpty { .. }
                | W::FoldersVanished { .. }
                | W::ManyVanished { .. }
                | W::AttributesTooLarge { .. }
                | W::AttributesRefused { .. }
                | W::GroupRightsUnknown { .. }
                | W::SourceLeftOut { .. }
                | W::ForeignObject { .. }
                | W::SubvolumesLeftOut { .. }
                | W::DumpShrank { .. }
        )
    }

    /// Whether an older snapshot has, or had, another content than its owner may think, or the run cost more
    /// than it should.
    #[must_use]
    pub fn is_of_content(&self) -> bool {
        use Warning as W;
        matches!(
            self,
            W::DamageHealed { .. }
                | W::MissedChangeCopied { .. }
                | W::LatestNotMoved { .. }
                | W::UnchangedCopied { .. }
                | W::LinksSplit { .. }
                | W::HolesRead { .. }
        )
    }
}

impl RunRecord {
    /// How many of the files in [`RunRecord::unread`] are in the snapshot, and lack only attributes.
    #[must_use]
    pub fn without_attributes(&self) -> u64 {
        use Warning as W;
        let lack = self.warnings.iter().map(|warning| match warning {
            W::AttributesTooLarge { files } | W::AttributesRefused { files } => *files,
            W::GroupRightsUnknown { folders } => *folders,
            _ => 0,
        });
        lack.fold(0, u64::saturating_add).min(self.unread.count)
    }

    /// Why a file is missing: what rsync reported of it, or of its place on the volume.
    #[must_use]
    pub fn reason_unread(&self, name: &str) -> Option<String> {
        let left_out = self.warnings.iter().find_map(|warning| match warning {
            Warning::SourceLeftOut { path, why } if path == name => Some(why.clone()),
            _ => None,
        });
        // The name ends where the quote does; in a few messages there is a comma instead.
        let ends = [format!("{name}\""), format!("{name},")];
        let mut messages = self.messages.names.iter();
        left_out.or_else(|| {
            let message = messages.find(|message| ends.iter().any(|end| message.contains(end)))?;
            let (_, reason) = message.rsplit_once(": ")?;
            let attribute = message
                .contains("xattr(")
                .then(|| message.split('"').nth(3))
                .flatten()
                .map(|attribute| format!("attribute {attribute}: "));
            Some(format!("{}{reason}", attribute.unwrap_or_default()))
        })
    }
}
