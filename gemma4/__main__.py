# SPDX-License-Identifier: Apache-2.0
from gemma4.cli import main

raise SystemExit(main())
