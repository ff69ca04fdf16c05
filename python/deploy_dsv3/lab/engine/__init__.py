"""The lab's engine image: real Ray beside a stand-in for LMDeploy."""
